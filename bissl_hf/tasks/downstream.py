"""A downstream task as one object: what is asked of an image, how it is trained, measured and described."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import BitImageProcessorPil, EvalPrediction

from ..data.augment import EvalTransform, TrainTransform, image_processor
from ..evaluation.metrics import (
    MAIN_METRIC,
    MULTI_LABEL,
    REGRESSION,
    classification_metrics,
    per_class_scores,
    regression_metrics,
)
from .labelled import LabelledImages

_NUM_CLASSES_SHOWN = 10


@dataclass(frozen=True)
class DownstreamTask:
    """What the upper level, joint training and fine-tuning learn.

    Args:
        problem_type (`str`): as in the configuration of a model: `"single_label_classification"`,
            `"multi_label_classification"` or `"regression"`.
        class_names (`list[str]`): one per output of the head; for a regression the name of the quantity.
        image_size (`int`): side of the images that the model sees, in pixels.
        train_transform ([`TrainTransform`])
    """

    problem_type: str
    class_names: list[str]
    image_size: int
    train_transform: TrainTransform

    @classmethod
    def from_images(cls, images: LabelledImages, image_size: int, train_transform: TrainTransform) -> "DownstreamTask":
        """Returns the task that labelled images pose."""
        return cls(images.problem_type, images.class_names, image_size, train_transform)

    @property
    def metric(self) -> str:
        """Name of the metric by which models are compared; higher is better."""
        return MAIN_METRIC[self.problem_type]

    @property
    def compute_metrics(self) -> Callable[[EvalPrediction], dict[str, float]]:
        """The `compute_metrics` of `transformers.Trainer`."""
        if self.problem_type == REGRESSION:
            return regression_metrics
        return classification_metrics(self.problem_type, num_labels=len(self.class_names))

    @property
    def image_processor(self) -> BitImageProcessorPil:
        """What brings an image of any size into the form that the model takes, for `pipeline` and other users."""
        return image_processor(self.image_size)

    def trainer_arguments(self) -> dict[str, Any]:
        """Returns what any trainer of this package takes from the task."""
        return {
            "train_transform": self.train_transform,
            "eval_transform": EvalTransform(self.image_size),
            "processing_class": self.image_processor,
            "compute_metrics": self.compute_metrics,
        }

    def per_class(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Returns the accuracy of each class, or with several labels its average precision; nothing for a regression.

        Args:
            predictions: logits, shape `(examples, classes)`.
            labels: class numbers, shape `(examples,)`, or multi-hot, shape `(examples, classes)`.
        """
        if self.problem_type == REGRESSION:
            return {}
        return per_class_scores(self.problem_type, np.asarray(predictions), np.asarray(labels), self.class_names)

    def describe(self) -> str:
        """Returns the task as a sentence, for the screen and for cards."""
        if self.problem_type == REGRESSION:
            return f"The model predicts a number, {self.class_names[0]}."
        shown = ", ".join(self.class_names[:_NUM_CLASSES_SHOWN])
        more = ", ..." if len(self.class_names) > _NUM_CLASSES_SHOWN else ""
        each = "any" if self.problem_type == MULTI_LABEL else "one"
        return f"An image has {each} of {len(self.class_names)} classes: {shown}{more}."

    def describe_splits(self, images: LabelledImages) -> str:
        """Returns the sizes of the splits and the balance of the classes in training, in lines."""
        sizes = ", ".join(f"{len(getattr(images, split)):,} {split}" for split in ("train", "validation", "test"))
        labels = images.train.labels
        if labels is None or self.problem_type == REGRESSION:
            return f"Labelled images: {sizes}.\n{self.describe()}"
        counts = labels.sum(axis=0) if labels.ndim > 1 else np.bincount(labels, minlength=len(self.class_names))
        rarest, commonest = int(counts.argmin()), int(counts.argmax())
        if counts[rarest] == counts[commonest]:
            return f"Labelled images: {sizes}.\n{self.describe()}\nIn training {int(counts[rarest])} of each class."
        return (
            f"Labelled images: {sizes}.\n{self.describe()}\n"
            f"In training {int(counts[rarest])} of the rarest ({self.class_names[rarest]}) and "
            f"{int(counts[commonest])} of the commonest ({self.class_names[commonest]})."
        )
