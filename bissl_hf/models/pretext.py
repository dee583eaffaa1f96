"""Pretext models by the name of their task, on a given backbone."""

from collections.abc import Callable
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel, ViTConfig, ViTMAEConfig

from .auto import PRETEXT_MODELS, pretext_class
from .backbone import build_backbone
from .mae import mae_from_backbone

# Tasks whose model is one of transformers, with what builds it on a backbone.
NATIVE_TASKS: dict[str, Callable[..., PreTrainedModel]] = {"mae": mae_from_backbone}


def pretext_tasks() -> tuple[str, ...]:
    """Returns the names of the pretext tasks."""
    return (*PRETEXT_MODELS, *NATIVE_TASKS)


def build_pretext_model(task: str, backbone: str | PreTrainedModel, **settings: Any) -> PreTrainedModel:
    """Builds the model of a pretext task on a backbone with its weights, which are copied.

    Args:
        task (`str`): one of `pretext_tasks()`.
        backbone (`str` or `PreTrainedModel`): a folder, a Hub id, or a model (its base model counts).
        **settings: of the task: the arguments of its configuration, or of `mae_from_backbone`.

    Raises:
        `ValueError`: for an unknown task.
    """
    if task in NATIVE_TASKS:
        return NATIVE_TASKS[task](backbone, **settings)
    if task not in PRETEXT_MODELS:
        raise ValueError(f"pretext is {task!r}; it must be one of {', '.join(pretext_tasks())}.")
    model_class: Any = pretext_class(task)
    return model_class.from_backbone(backbone, **settings)


def new_pretext_model(task: str, backbone_config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """Builds the model of a pretext task with new weights, on a backbone of this configuration.

    Args:
        task (`str`), **settings: see [`build_pretext_model`].
        backbone_config (`PretrainedConfig`)

    Raises:
        `ValueError`: for an unknown task.
    """
    if task in PRETEXT_MODELS:
        model_class: Any = pretext_class(task)
        return model_class(model_class.config_class(backbone_config=backbone_config, **settings))
    # Random positions that stay fixed would hardly distinguish patches.
    fixed = {"positions": "sincos"} if task == "mae" else {}
    return build_pretext_model(task, build_backbone(backbone_config), **fixed, **settings)


def downstream_config(model: PreTrainedModel) -> PretrainedConfig:
    """Returns the configuration of the backbone of a pretext model, as downstream models on it take it."""
    if isinstance(model.config, ViTMAEConfig):
        shared = {name: value for name, value in model.config.to_dict().items() if hasattr(ViTConfig(), name)}
        shared.pop("model_type", None)
        return ViTConfig(**shared)
    config: Any = model.config
    return getattr(config, "backbone_config", config)
