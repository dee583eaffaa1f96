"""What the features of a checkpoint are worth for a labelled data set, in numbers."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .features import with_one_class
from .geometry import class_scatter, linear_cka, mean_silhouette
from .metrics import eleven_point_map
from .probes import knn_accuracy, knn_scores, linear_probe

Labelled = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class FeatureReport:
    """Figures of one checkpoint on the test split. Where images may have several classes `knn` and `probe` are
    11-point mean average precisions instead of accuracies, and the others are of the images with one class.

    Args:
        knn (`float`): of the weighted vote of the nearest training examples.
        probe (`float`): of a logistic regression on standardised features.
        probe_strength (`float`): its inverse regularisation strength C, chosen on the validation split.
        silhouette (`float`): mean silhouette.
        within_class_scatter (`float`): variance within classes.
        between_class_scatter (`float`): variance between classes.
        scatter_ratio (`float`): between over within.
    """

    knn: float
    probe: float
    probe_strength: float
    silhouette: float
    within_class_scatter: float
    between_class_scatter: float
    scatter_ratio: float


def report_features(splits: Mapping[str, Labelled], *, num_classes: int, neighbors: int = 20) -> FeatureReport:
    """Measures the features of the splits `train`, `validation` and `test`.

    Args:
        splits (`Mapping[str, tuple[np.ndarray, np.ndarray]]`): features of shape `(rows, width)` and their labels, of
            shape `(rows,)` or multi-hot of shape `(rows, classes)`.
        num_classes (`int`): number of classes.
        neighbors (`int`, *optional*, defaults to 20): how many vote.

    Returns:
        [`FeatureReport`]
    """
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    if test[1].ndim == 1:
        knn = knn_accuracy(*train, *test, neighbors=neighbors)
    else:
        scores = knn_scores(*train, test[0], num_classes=num_classes, neighbors=neighbors)
        knn = eleven_point_map(scores, test[1])
    probe = linear_probe(train, validation, test)
    features, labels = with_one_class(*test)
    scatter = class_scatter(features, labels)
    return FeatureReport(
        knn=knn,
        probe=probe.score,
        probe_strength=probe.strength,
        silhouette=mean_silhouette(features, labels),
        within_class_scatter=scatter.within,
        between_class_scatter=scatter.between,
        scatter_ratio=scatter.ratio,
    )


def cka_matrix(features: list[np.ndarray]) -> np.ndarray:
    """Returns the linear CKA of each with each, shape `(checkpoints, checkpoints)`.

    Args:
        features (`list[np.ndarray]`): of the same examples by each checkpoint, shapes `(rows, width)`.
    """
    return np.array([[linear_cka(first, second) for second in features] for first in features])
