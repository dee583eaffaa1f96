"""Class weights of a downstream loss with one label per example."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.balanced import BALANCED, row_labels
from ..tensors import at_least_float32


def resolve_class_weights(given: str | Sequence[float], labels: Tensor, num_classes: int) -> Tensor:
    """Returns a weight for each class, float64, shape `(num_classes,)`.

    Args:
        given (`str` or `Sequence[float]`): `"balanced"`, for n / (K n_c) with n_c of n training examples in each of K
            classes, so that each class weighs the same and the mean weight of an example is 1; or a weight per class.
        labels (`torch.Tensor`): class numbers of the training examples, shape `(examples,)`.
        num_classes (`int`)

    Raises:
        `ValueError`: for another word, a wrong number of weights, weights that are negative or not finite, or a
            class without examples.
    """
    if isinstance(given, str):
        if given != BALANCED:
            raise ValueError(f"class_weights is {given!r}; it must be {BALANCED} or a weight for each class.")
        counts = torch.bincount(labels, minlength=num_classes)
        if (counts == 0).any():
            raise ValueError(
                f"class_weights is {BALANCED}, and class {int(counts.argmin())} has no training example; give a "
                "weight for each class."
            )
        return len(labels) / (num_classes * counts.double())
    weights = torch.tensor(list(given), dtype=torch.float64)
    if len(weights) != num_classes or not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
        raise ValueError(
            f"class_weights is {list(given)}; it must be {num_classes} finite numbers of at least 0, not all 0."
        )
    return weights


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Returns the mean over the rows of w_y times the cross-entropy, shape `()`. It is divided by the number of rows,
    not by the sum of their weights as torch does, so that parts of a batch add up to the batch.

    Args:
        logits (`torch.Tensor`): shape `(rows, classes)`.
        labels (`torch.Tensor`): class numbers, shape `(rows,)`.
        weights (`torch.Tensor`): shape `(classes,)`.
    """
    scores = at_least_float32(logits)
    return F.cross_entropy(scores, labels, weight=weights.to(scores), reduction="sum") / len(labels)


class DownstreamLoss:
    """The loss of a classifier on a batch: the model's own, or with class weights [`weighted_cross_entropy`].

    Args:
        class_weights (`str` or `Sequence[float]`, *optional*): see [`resolve_class_weights`].
        config: of the model.
        dataset: the training examples, whose labels `"balanced"` counts.

    Raises:
        `ValueError`: for weights that are not allowed, or a task without one class per example.
    """

    def __init__(self, class_weights: str | Sequence[float] | None, *, config: Any, dataset: Any) -> None:
        self.weights: Tensor | None = None
        if class_weights is None:
            return
        if config.problem_type not in (None, "single_label_classification") or config.num_labels < 2:
            raise ValueError(
                f"class_weights is {class_weights!r}, and the task is {config.problem_type or 'a regression'} with "
                f"{config.num_labels} outputs; weights are for one class per example. Leave class_weights out."
            )
        if dataset is None:
            raise ValueError(f"class_weights is {class_weights!r}, and there is no train_dataset; give one.")
        labels = torch.as_tensor(row_labels(dataset)) if isinstance(class_weights, str) else torch.empty(0)
        self.weights = resolve_class_weights(class_weights, labels, config.num_labels)

    def __call__(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> Tensor:
        """Returns the loss, shape `()`.

        Args:
            model (`Callable`): takes the inputs as keyword arguments.
            inputs (`Mapping`): a batch.
        """
        return self.with_outputs(model, inputs)[0]

    def with_outputs(self, model: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Returns the loss, shape `()`, and the outputs of the model; see `__call__`."""
        if self.weights is None or "labels" not in inputs:
            outputs = model(**inputs)
            return outputs.loss, outputs
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        return weighted_cross_entropy(outputs.logits, inputs["labels"], self.weights), outputs

    def describe(self) -> list[float] | None:
        """Returns the weights, for what a resume compares."""
        return None if self.weights is None else self.weights.tolist()
