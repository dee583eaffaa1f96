"""Image classifiers with a new head on a backbone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from .pretext import downstream_config

SINGLE_LABEL = "single_label_classification"


def new_classifier(
    backbone_config: PretrainedConfig, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL
) -> PreTrainedModel:
    """Returns the image classifier on this kind of backbone with new weights and a head for these classes. Its dtype
    is torch's default, whatever the configuration of a checkpoint in half precision says.

    Args:
        backbone_config (`PretrainedConfig`)
        class_names (`Sequence[str]`)
        problem_type (`str`, *optional*): decides the loss, as in the configuration of any classifier.

    Raises:
        `ValueError`: if there is no classifier on this kind of backbone.
    """
    if type(backbone_config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"The backbone is of type {backbone_config.model_type!r}, on which transformers has no image classifier; "
            "join models of your own with BiSSLModel.from_models, or use another backbone."
        )
    config: Any = type(backbone_config).from_dict(backbone_config.to_dict())
    set_labels(config, class_names, problem_type=problem_type)
    return AutoModelForImageClassification.from_config(config, dtype=torch.get_default_dtype())


def set_labels(config: Any, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL) -> None:
    """Writes the classes and the kind of problem into the configuration of a classifier."""
    config.problem_type = problem_type
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}


def classifier_on(
    backbone: PreTrainedModel, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL
) -> PreTrainedModel:
    """Returns a classifier with a new head and the weights of a backbone, which are copied.

    Args:
        backbone (`PreTrainedModel`): a backbone, or a model on one.
        class_names (`Sequence[str]`), problem_type (`str`, *optional*): see [`new_classifier`].

    Raises:
        `ValueError`: if the backbone lacks weights that the classifier has, or there is no classifier on it.
    """
    model: Any = new_classifier(downstream_config(backbone), class_names, problem_type=problem_type)
    model.to(device=backbone.device, dtype=backbone.dtype)
    weights = backbone.base_model.state_dict()
    missing = [name for name in model.base_model.state_dict() if name not in weights]
    if missing:
        raise ValueError(
            f"The backbone, a {type(backbone).__name__}, lacks {len(missing)} of the weights of "
            f"{type(model).__name__}: {', '.join(missing[:5])}."
        )
    # A base model may hold more than its classifier uses: the pooler of a ViT.
    model.base_model.load_state_dict(weights, strict=False)
    return model


def labels_of_task(id2label: Mapping[int, str] | None, num_labels: int | None, task: Any) -> tuple[list[str], str]:
    """Returns the names of the classes, and the kind of problem, from one of three descriptions.

    Args:
        id2label (`Mapping[int, str]`, *optional*): names by numbers, from 0.
        num_labels (`int`, *optional*)
        task (*optional*): an object with `class_names` and `problem_type`.

    Raises:
        `ValueError`: if not exactly one is given, or it describes no classes.
    """
    given = {"id2label": id2label, "num_labels": num_labels, "task": task}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"Of id2label, num_labels and task {' and '.join(named) or 'none'} is given; give one.")
    if task is not None:
        return list(task.class_names), task.problem_type
    if id2label is None:
        if isinstance(num_labels, bool) or not isinstance(num_labels, int) or num_labels < 1:
            raise ValueError(f"num_labels is {num_labels!r}; it must be an integer of at least 1.")
        return [f"LABEL_{number}" for number in range(num_labels)], SINGLE_LABEL
    if not id2label or sorted(id2label) != list(range(len(id2label))):
        raise ValueError(f"id2label has the numbers {sorted(id2label)}; they must be 0, 1, ..., one for each class.")
    return [id2label[number] for number in range(len(id2label))], SINGLE_LABEL
