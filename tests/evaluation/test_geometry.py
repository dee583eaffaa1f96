"""Similarity of features and scatter of classes against loops and dense formulas."""

import numpy as np
import pytest

from bissl_hf.evaluation.geometry import class_scatter, linear_cka, mean_silhouette


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def hsic(first: np.ndarray, second: np.ndarray) -> float:
    """tr(K H L H) / (n - 1)^2 with dense matrices, in the width of the examples."""
    n = len(first)
    centring = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(first @ first.T @ centring @ second @ second.T @ centring) / (n - 1) ** 2)


def test_cka_is_the_normalised_hsic_of_linear_kernels(random) -> None:
    first, second = random.normal(size=(30, 7)) + 3, random.normal(size=(30, 4))
    second[:, 0] += first[:, 1]
    expected = hsic(first, second) / np.sqrt(hsic(first, first) * hsic(second, second))
    assert linear_cka(first, second) == pytest.approx(expected, rel=1e-12)
    assert 0.05 < expected < 0.95
    assert linear_cka(second, first) == pytest.approx(expected, rel=1e-12)


def test_cka_is_one_for_a_rotation_a_scale_and_a_shift(random) -> None:
    features = random.normal(size=(30, 5))
    rotation, _ = np.linalg.qr(random.normal(size=(5, 5)))
    assert linear_cka(features, 3 * features @ rotation - 7) == pytest.approx(1)
    assert linear_cka(features, features * np.array([1, 1, 1, 1, 9])) < 0.9


def test_cka_of_single_precision_features_with_a_large_mean_is_exact(random) -> None:
    features = (random.normal(size=(500, 6)) + 1000).astype(np.float32)
    assert linear_cka(features, 2 * features.astype(np.float64)) == pytest.approx(1, abs=1e-9)


def test_cka_of_constant_features_is_not_defined() -> None:
    assert np.isnan(linear_cka(np.ones((4, 2)), np.eye(4)))


def test_cka_needs_the_same_examples() -> None:
    with pytest.raises(ValueError, match="The features have 4 and 3 rows; they must be of the same examples"):
        linear_cka(np.eye(4), np.eye(3))


def test_scatter_is_that_of_loops_and_adds_up_to_the_variance(random) -> None:
    features, labels = random.normal(size=(40, 3)).astype(np.float32), random.choice([0, 2, 7], 40, p=[0.6, 0.3, 0.1])
    features[labels == 2] += 2
    mean = sum(features.astype(float)) / 40
    within = between = 0.0
    for label in (0, 2, 7):
        mine = [row for row, other in zip(features.astype(float), labels, strict=True) if other == label]
        centre = sum(mine) / len(mine)
        for row in mine:
            within += sum((row - centre) ** 2) / 40
            between += sum((centre - mean) ** 2) / 40
    found = class_scatter(features, labels)
    assert (found.within, found.between) == (pytest.approx(within), pytest.approx(between))
    assert found.within + found.between == pytest.approx(features.astype(float).var(axis=0).sum())
    assert found.ratio == pytest.approx(between / within)


def test_scatter_of_classes_that_are_points() -> None:
    found = class_scatter(np.array([[0.0, 1], [0, 1], [4, 1]]), np.array([0, 0, 1]))
    assert (found.within, found.ratio) == (0, np.inf)


def test_silhouette_is_that_of_loops(random) -> None:
    features, labels = random.normal(size=(20, 3)), np.arange(20) % 3
    features[labels == 1] += 2
    values = []
    for row in range(20):
        distances = np.linalg.norm(features - features[row], axis=1)
        own = [distances[other] for other in range(20) if labels[other] == labels[row] and other != row]
        others = [np.mean(distances[labels == label]) for label in range(3) if label != labels[row]]
        values.append((min(others) - np.mean(own)) / max(min(others), np.mean(own)))
    assert mean_silhouette(features, labels) == pytest.approx(np.mean(values))


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_silhouette_of_one_class_or_of_single_examples_is_not_defined(labels) -> None:
    assert np.isnan(mean_silhouette(np.eye(3), np.array(labels)))
