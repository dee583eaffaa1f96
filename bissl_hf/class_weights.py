"""Class weights of a downstream loss with one label per example."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .tensors import at_least_float32

BALANCED = "balanced"


def resolve_class_weights(given: str | Sequence[float], labels: Tensor, num_classes: int) -> Tensor:
    """Returns a weight for each class, shape `(num_classes,)`.

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
        return len(labels) / (num_classes * counts.float())
    weights = torch.tensor(list(given), dtype=torch.float32)
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
