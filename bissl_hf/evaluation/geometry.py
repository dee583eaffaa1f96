"""How classes are arranged in a space of features, and how similar two such spaces are."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import silhouette_score


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Centred kernel alignment with linear kernels (Kornblith et al., arXiv 1905.00414, section 3):
    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) for centred X and Y, in Frobenius norms. It is 1 for features that differ by a
    rotation, a scale and a shift.

    Args:
        first, second (`np.ndarray`): features of the same examples, shapes `(rows, width)` and `(rows, other_width)`.

    Returns:
        `float`: between 0 and 1; NaN if the features of one side are constant.

    Raises:
        `ValueError`: if they are not of the same examples, as many rows.
    """
    if len(first) != len(second):
        raise ValueError(
            f"The features have {len(first)} and {len(second)} rows; they must be of the same examples, in order."
        )
    x, y = (features.astype(np.float64) - features.mean(axis=0, dtype=np.float64) for features in (first, second))
    size = float(np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return float(np.linalg.norm(y.T @ x) ** 2 / size) if size > 0 else float("nan")


@dataclass(frozen=True)
class ClassScatter:
    """The spread of features, per example: the traces of the scatter matrices of Fisher's discriminant analysis,
    divided by the number of examples. Their sum is the variance of the features.

    Args:
        within (`float`): mean squared distance of an example from the mean of its class.
        between (`float`): mean over examples of the squared distance of their class's mean from the mean of all.
    """

    within: float
    between: float

    @property
    def ratio(self) -> float:
        """Between-class over within-class scatter; infinite if classes are points."""
        return self.between / self.within if self.within > 0 else float("inf")


def class_scatter(features: np.ndarray, labels: np.ndarray) -> ClassScatter:
    """Splits the variance of features into that within and that between classes.

    Args:
        features (`np.ndarray`): shape `(rows, width)`.
        labels (`np.ndarray`): class numbers, shape `(rows,)`.

    Returns:
        [`ClassScatter`]
    """
    features = features.astype(np.float64)
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.stack([features[classes == number].mean(axis=0) for number in range(len(counts))])
    within = float(((features - means[classes]) ** 2).sum(axis=1).mean())
    between = float(((means - features.mean(axis=0)) ** 2).sum(axis=1) @ counts / counts.sum())
    return ClassScatter(within, between)


def mean_silhouette(features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean silhouette (Rousseeuw, 1987) in Euclidean distance: between -1 and 1, the higher the better
    classes are apart. NaN where it is not defined: for fewer than two classes, or classes of one example each.

    Args:
        features (`np.ndarray`): shape `(rows, width)`.
        labels (`np.ndarray`): class numbers, shape `(rows,)`.
    """
    if not 2 <= len(np.unique(labels)) < len(labels):
        return float("nan")
    return float(silhouette_score(features, labels))
