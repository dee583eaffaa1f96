"""Where a classifier errs: which classes it takes for which others, and on which images it is most sure and wrong."""

import numpy as np


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns how many images of each class (rows) are predicted to be of each (columns), shape `(classes, classes)`.

    Args:
        labels, predicted (`np.ndarray`): class numbers, shape `(images,)`.
        num_classes (`int`)
    """
    places = np.asarray(labels, dtype=np.int64) * num_classes + np.asarray(predicted, dtype=np.int64)
    return np.bincount(places, minlength=num_classes**2).reshape(num_classes, num_classes)


def most_confused(counts: np.ndarray, number: int) -> list[tuple[int, int, int]]:
    """Returns the most frequent errors as `(class, predicted, count)`, the most frequent first."""
    off = counts - np.diag(np.diag(counts))
    order = np.argsort(-off, axis=None, kind="stable")[:number]
    found = (divmod(int(place), len(counts)) for place in order)
    return [(row, column, int(off[row, column])) for row, column in found if off[row, column]]


def most_confident_errors(labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, number: int) -> list[int]:
    """Returns the rows that are predicted wrongly, the most confident first.

    Args:
        labels, predicted (`np.ndarray`): class numbers, shape `(images,)`.
        confidence (`np.ndarray`): probability of the predicted class, shape `(images,)`.
        number (`int`): how many rows at most.
    """
    wrong = np.flatnonzero(np.asarray(labels) != np.asarray(predicted))
    order = np.argsort(-np.asarray(confidence)[wrong], kind="stable")
    return [int(row) for row in wrong[order][:number]]


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities, shape `(images, classes)`, of logits of that shape."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
