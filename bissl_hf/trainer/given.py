"""What a trainer is given, looked at before anything is trained: arguments, hooks, data sets and their first rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.utils import logging

from ..data.balanced import BalancedRows
from ..data.decoded import DecodedImages

logger = logging.get_logger(__name__)

LABEL_KEYS = ("labels", "label", "label_ids")
IGNORED_LABEL = -100


def evaluate_nothing_without_data(args: TrainingArguments, eval_dataset: Any) -> None:
    """Turns evaluation off, and says so, where there is no data for it."""
    if eval_dataset is None and args.eval_strategy != "no":
        logger.info("No eval_dataset was given, so nothing is evaluated during training.")
        args.eval_strategy = type(args.eval_strategy)("no")


def check_arguments(args: Any, expected: type, trainer: type) -> None:
    """Refuses arguments of another class.

    Raises:
        `TypeError`: with the class that the trainer takes.
    """
    if not isinstance(args, expected):
        raise TypeError(
            f"args is a {type(args).__name__}; {trainer.__name__} takes {expected.__name__}, which has all fields of "
            "transformers.TrainingArguments and those of this package."
        )


def refuse_loss_hooks(trainer: type[Trainer], own: type[Trainer], trainer_kwargs: Mapping[str, Any], way: str) -> None:
    """Refuses ways of `transformers.Trainer` to change the loss that training here would not use.

    Args:
        trainer (`type`): class of the trainer.
        own (`type`): class whose `compute_loss` it must keep.
        trainer_kwargs (`Mapping`): arguments for `transformers.Trainer`.
        way (`str`): the hooks to write instead.

    Raises:
        `TypeError`: with the hooks.
    """
    if trainer_kwargs.get("compute_loss_func") is not None:
        raise TypeError(f"compute_loss_func is not used by {own.__name__}; {way}.")
    if trainer.compute_loss is not own.compute_loss:
        raise TypeError(f"{trainer.__name__} overrides compute_loss, which {own.__name__} does not train; {way}.")


def check_rows(dataset: Any, *, name: str, transform: str, labelled_for: PreTrainedModel | None = None) -> None:
    """Looks at the first row of a data set, and at all labels where they are at hand.

    Args:
        dataset: map-style data set with at least one row.
        name (`str`): its argument.
        transform (`str`): the argument of its transform, for messages.
        labelled_for (`PreTrainedModel`, *optional*): the model that learns its labels.

    Raises:
        `TypeError`: for rows that are no dictionaries, or hold images that are not yet tensors.
        `ValueError`: for rows without labels, or labels that the model has no output for.
    """
    row = dataset[0]
    if not isinstance(row, Mapping):
        raise TypeError(
            f"A row of {name} is a {type(row).__name__}; it must be a dictionary of what the model's forward pass "
            "takes, such as {'pixel_values': ..., 'labels': ...}."
        )
    if pictures := [key for key, value in row.items() if isinstance(value, PIL.Image.Image)]:
        raise TypeError(
            f"A row of {name} has a PIL image in {pictures[0]!r}; models take tensors. Pass a datasets.Dataset with a "
            f"column of images and {transform}=..., decode it with DecodedImages.from_dataset, or make 'pixel_values' "
            "in its with_transform."
        )
    if labelled_for is None:
        return
    if all(row.get(key) is None for key in LABEL_KEYS):
        raise ValueError(
            f"A row of {name} has no labels, only {', '.join(row)}; the downstream loss needs them under 'labels'. "
            "Rename the column, or pass unlabelled rows as lower_dataset."
        )
    check_label_range(dataset, row, name=name, model=labelled_for)


def check_label_range(dataset: Any, row: Mapping[str, Any], *, name: str, model: PreTrainedModel) -> None:
    """Refuses class numbers that a classifier has no output for; where a label is one whole number per row.

    Raises:
        `ValueError`: with the label.
    """
    problem, outputs = getattr(model.config, "problem_type", None), model.config.num_labels or 0
    if problem not in (None, "single_label_classification") or not type(model).__name__.endswith("Classification"):
        return
    labels = _labels_at_hand(dataset, row)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or outputs < 2:
        return
    wrong = labels[((labels < 0) | (labels >= outputs)) & (labels != IGNORED_LABEL)]
    if len(wrong):
        raise ValueError(
            f"{name} has the label {wrong[0]}, and {type(model).__name__} has {outputs} outputs, for the classes 0 to "
            f"{outputs - 1}. Build it with num_labels={int(labels.max()) + 1}, or number the classes anew."
        )


def _labels_at_hand(dataset: Any, row: Mapping[str, Any]) -> np.ndarray:
    """Returns all labels of a data set that keeps them in a column, else that of its first row."""
    if isinstance(dataset, DecodedImages | BalancedRows):
        return np.asarray(dataset.labels)
    key = next(key for key in LABEL_KEYS if row.get(key) is not None)
    if isinstance(dataset, Dataset) and key in dataset.column_names and dataset.format["type"] != "custom":
        return np.asarray(dataset.with_format(None)[:][key])
    return np.atleast_1d(torch.as_tensor(row[key]).numpy())
