"""How well simple classifiers separate the classes of frozen features: nearest neighbours and a linear probe.

Labels are class numbers of shape `(rows,)`, or multi-hot of shape `(rows, classes)` where an image may have several
classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from .metrics import eleven_point_map

PROBE_STRENGTHS = tuple(10.0**exponent for exponent in range(-4, 3))


def knn_scores(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    *,
    num_classes: int | None = None,
    neighbors: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Scores classes by a weighted vote of the nearest training examples under the cosine similarity s, each with the
    weight exp(s / temperature) (Wu et al., arXiv 1805.01978, section 3.4).

    Args:
        train_features (`np.ndarray`): shape `(train_rows, width)`.
        train_labels (`np.ndarray`): their labels.
        features (`np.ndarray`): to be classified, shape `(rows, width)`.
        num_classes (`int`, *optional*): number of classes; that of the training labels if not given.
        neighbors (`int`, *optional*, defaults to 20): how many vote; at most all training examples do.
        temperature (`float`, *optional*, defaults to 0.07): above 0.

    Returns:
        `np.ndarray`: shape `(rows, num_classes)`, the share of the votes' weight that each class has.

    Raises:
        `ValueError`: for fewer than one neighbour, or a temperature that is not positive.
    """
    if neighbors < 1:
        raise ValueError(f"neighbors is {neighbors}; it must be at least 1.")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    one_hot = _as_multi_hot(train_labels, num_classes)
    index = NearestNeighbors(n_neighbors=min(neighbors, len(train_features)), metric="cosine", algorithm="brute")
    distances, rows = index.fit(train_features).kneighbors(features)
    # The weights of a row are divided by that of its nearest, which changes no share: exp(1 / 0.07) is 1.6e6.
    weights = np.exp((distances[:, :1] - distances) / temperature)
    return np.einsum("rn,rnc->rc", weights / weights.sum(axis=1, keepdims=True), one_hot[rows])


def knn_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    features: np.ndarray,
    labels: np.ndarray,
    *,
    neighbors: int = 20,
    temperature: float = 0.07,
) -> float:
    """Returns the fraction of rows whose class wins the vote of the nearest training examples, see [`knn_scores`].

    Args:
        train_features (`np.ndarray`): shape `(train_rows, width)`.
        train_labels (`np.ndarray`): class numbers, shape `(train_rows,)`.
        features (`np.ndarray`): to be classified, shape `(rows, width)`.
        labels (`np.ndarray`): their class numbers, shape `(rows,)`.
        neighbors (`int`, *optional*, defaults to 20), temperature (`float`, *optional*, defaults to 0.07): see there.
    """
    num_classes = int(max(np.max(train_labels), np.max(labels))) + 1
    scores = knn_scores(
        train_features,
        train_labels,
        features,
        num_classes=num_classes,
        neighbors=neighbors,
        temperature=temperature,
    )
    return float(np.mean(scores.argmax(axis=1) == labels))


@dataclass(frozen=True)
class ProbeResult:
    """What a linear probe found.

    Args:
        score (`float`): on the test split: accuracy, or the 11-point mean average precision for multi-hot labels.
        validation_score (`float`): of the strength that was chosen.
        strength (`float`): the inverse regularisation strength C that was chosen on the validation split.
    """

    score: float
    validation_score: float
    strength: float


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    strengths: Sequence[float] = PROBE_STRENGTHS,
) -> ProbeResult:
    """Fits a logistic regression on standardised features. The strength C is chosen on the validation split, then the
    probe is fitted anew on both splits and read on the test split, once.

    Args:
        train, validation, test (`tuple[np.ndarray, np.ndarray]`): features of shape `(rows, width)` and their labels.
        strengths (`Sequence[float]`, *optional*): values of C; the smaller of two that score the same is taken.

    Returns:
        [`ProbeResult`]

    Raises:
        `ValueError`: if no strength is given, or the training labels have a single class.
    """
    if not strengths:
        raise ValueError("strengths is empty; give at least one value of C.")
    if len(np.unique(train[1], axis=0)) < 2:
        raise ValueError("The training labels of the linear probe have a single class; it needs at least two.")
    scores = {strength: _probe_score(_fit_probe(*train, strength), *validation) for strength in sorted(strengths)}
    best = max(scores, key=scores.__getitem__)
    features, labels = (np.concatenate(parts) for parts in zip(train, validation, strict=True))
    return ProbeResult(_probe_score(_fit_probe(features, labels, best), *test), scores[best], best)


def _fit_probe(features: np.ndarray, labels: np.ndarray, strength: float) -> Pipeline:
    regression = LogisticRegression(C=strength, max_iter=5000)
    return make_pipeline(StandardScaler(), regression if labels.ndim == 1 else OneVsRestClassifier(regression)).fit(
        features.astype(np.float64), labels
    )


def _probe_score(probe: Pipeline, features: np.ndarray, labels: np.ndarray) -> float:
    features = features.astype(np.float64)
    if labels.ndim == 1:
        return float(np.mean(probe.predict(features) == labels))
    return eleven_point_map(probe.predict_proba(features), labels)


def _as_multi_hot(labels: np.ndarray, num_classes: int | None) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.ndim == 2:
        return labels.astype(np.float64)
    return np.eye(num_classes or int(labels.max()) + 1)[labels]
