"""A downstream task as one object: what is asked of an image, how it is trained, measured and described."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel

from ..class_weights import BALANCED
from ..data.augment import EvalTransform, TrainTransform, image_processor
from ..data.preprocessing import Preprocessing
from ..evaluation.metrics import (
    MAIN_METRIC,
    MULTI_LABEL,
    REGRESSION,
    classification_metrics,
    per_class_scores,
    regression_metrics,
)
from ..models.classifier import new_classifier
from .images import CropArguments, LabelledImages, build_train_transform
from .models import load_classifier

_NUM_CLASSES_SHOWN = 10


@dataclass
class LossArguments:
    """How the classes of a downstream task are weighted."""

    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "Weights of the classes in the loss: balanced (by the inverse of their numbers of images), or a "
            "number for each class in the order of their names."
        },
    )

    def weights(self) -> str | list[float] | None:
        """Returns what [`resolve_class_weights`] takes.

        Raises:
            `ValueError`: for words that are no numbers.
        """
        given = self.class_weights
        if given is None or given == [BALANCED]:
            return given if given is None else BALANCED
        try:
            return [float(word) for word in given]
        except ValueError as error:
            raise ValueError(
                f"class_weights is {' '.join(given)}; it must be {BALANCED}, or a number for each class."
            ) from error


@dataclass(frozen=True)
class DownstreamTask:
    """What the upper level, joint training and fine-tuning learn.

    Args:
        problem_type (`str`): as in the configuration of a model: `"single_label_classification"`,
            `"multi_label_classification"` or `"regression"`.
        class_names (`list[str]`): one per output of the head; for a regression the name of the quantity.
        preprocessing ([`Preprocessing`]): how images are prepared for the model.
        train_transform ([`TrainTransform`])
        class_weights (`str` or `list[float]`, *optional*): of the loss, see [`DownstreamLoss`].
    """

    problem_type: str
    class_names: list[str]
    preprocessing: Preprocessing
    train_transform: TrainTransform
    class_weights: str | list[float] | None = None

    @classmethod
    def from_images(
        cls,
        images: LabelledImages,
        preprocessing: Preprocessing,
        crops: CropArguments,
        class_weights: str | list[float] | None = None,
    ) -> "DownstreamTask":
        """Returns the task that labelled images pose."""
        crop = build_train_transform(preprocessing, crops)
        return cls(images.problem_type, images.class_names, preprocessing, crop, class_weights)

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

    def trainer_arguments(self) -> dict[str, Any]:
        """Returns what any trainer of this package takes from the task."""
        return {
            "train_transform": self.train_transform,
            "eval_transform": EvalTransform.from_processor(self.preprocessing),
            "processing_class": image_processor(self.preprocessing.side, **self.preprocessing.options),
            "compute_metrics": self.compute_metrics,
            "class_weights": self.class_weights,
        }

    def new_model(self, backbone_config: PretrainedConfig) -> PreTrainedModel:
        """Returns a model for the task with random weights."""
        return new_classifier(backbone_config, self.class_names, problem_type=self.problem_type)

    def load_model(self, source: str, *, field: str) -> PreTrainedModel:
        """Loads a model for the task; an error names the argument `field`."""
        return load_classifier(source, self.class_names, field=field, problem_type=self.problem_type)

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
        """Returns the sizes of the splits and the balance of the classes in training, as two lines."""
        sizes = ", ".join(f"{len(getattr(images, split))} {split}" for split in ("train", "validation", "test"))
        labels = images.train.labels
        if labels is None or self.problem_type == REGRESSION:
            return f"Labelled images: {sizes}. {self.describe()}"
        counts = labels.sum(axis=0) if labels.ndim > 1 else np.bincount(labels, minlength=len(self.class_names))
        rarest, commonest = int(counts.argmin()), int(counts.argmax())
        if counts[rarest] == counts[commonest]:
            return f"Labelled images: {sizes}. {self.describe()}\nIn training {int(counts[rarest])} of each class."
        return (
            f"Labelled images: {sizes}. {self.describe()}\n"
            f"In training {int(counts[rarest])} of the rarest ({self.class_names[rarest]}) and "
            f"{int(counts[commonest])} of the commonest ({self.class_names[commonest]})."
        )
