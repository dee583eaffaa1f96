"""Pretext models by the name of their task, on a given backbone."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from .auto import PRETEXT_MODELS, pretext_class
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
