"""Nearest neighbours and the linear probe against loops and against what is known of the data."""

import numpy as np
import pytest

from bissl_hf.evaluation.probes import knn_accuracy, knn_scores, linear_probe


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def vote(train: np.ndarray, labels: np.ndarray, row: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """Brute force, one row at a time: labels are multi-hot."""
    similarities = [float(t @ row / np.sqrt((t @ t) * (row @ row))) for t in train]
    nearest = sorted(range(len(train)), key=lambda index: -similarities[index])[:k]
    scores = np.zeros(labels.shape[1])
    total = 0.0
    for index in nearest:
        weight = np.exp(similarities[index] / temperature)
        scores += weight * labels[index]
        total += weight
    return scores / total


@pytest.mark.parametrize(("neighbors", "temperature"), [(1, 0.07), (7, 0.07), (200, 0.5)])
def test_knn_is_the_weighted_vote_of_brute_force(random, neighbors, temperature) -> None:
    train, rows = random.normal(size=(60, 5)), random.normal(size=(31, 5))
    train_labels, labels = random.integers(0, 4, 60), random.integers(0, 4, 31)
    one_hot = np.eye(4)[train_labels]
    expected = np.stack([vote(train, one_hot, row, min(neighbors, 60), temperature) for row in rows])
    options = {"neighbors": neighbors, "temperature": temperature}
    np.testing.assert_allclose(knn_scores(train, train_labels, rows, **options), expected, atol=1e-9)
    accuracy = knn_accuracy(train, train_labels, rows, labels, **options)
    assert accuracy == np.mean([scores.argmax() == label for scores, label in zip(expected, labels, strict=True)])
    assert 0 < accuracy < 1


def test_knn_does_not_overflow_at_small_temperatures(random) -> None:
    train, labels = random.normal(size=(20, 3)), np.arange(20) % 2
    scores = knn_scores(train, labels, train, temperature=1e-4)
    np.testing.assert_allclose(scores, np.eye(2)[labels], atol=1e-9)


def test_knn_of_several_labels_per_image(random) -> None:
    train, rows = random.normal(size=(30, 5)), random.normal(size=(9, 5))
    labels = (random.random((30, 6)) < 0.3).astype(np.uint8)
    expected = np.stack([vote(train, labels.astype(float), row, 5, 0.07) for row in rows])
    np.testing.assert_allclose(knn_scores(train, labels, rows, neighbors=5), expected, atol=1e-9)


def test_knn_of_classes_that_only_one_side_has(random) -> None:
    train = np.eye(3)
    assert knn_scores(train, np.array([0, 1, 1]), train, num_classes=5).shape == (3, 5)
    assert knn_accuracy(train, np.array([0, 1, 1]), train, np.array([0, 1, 4]), neighbors=1) == 2 / 3
    assert knn_accuracy(train, np.array([0, 1, 4]), train, np.array([0, 1, 1]), neighbors=1) == 2 / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbors": 0}, "neighbors is 0; it must be at least 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
    ],
)
def test_knn_refuses(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        knn_scores(np.eye(3), np.arange(3), np.eye(3), **options)


def shifted_classes(random: np.random.Generator, rows: int, *, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Three classes along the first two of six features, which are far apart in size."""
    labels = np.arange(rows) % 3
    features = noise * random.normal(size=(rows, 6))
    features[:, :2] += 4 * np.array([[0, 0], [1, 0], [0, 1]])[labels]
    return 7 + features * np.array([1e3, 1e-3, 1, 1, 1, 1]), labels


def test_probe_tells_separated_classes_apart_whatever_their_scale(random) -> None:
    result = linear_probe(*(shifted_classes(random, rows) for rows in (90, 60, 120)))
    assert result.score > 0.95
    assert result.validation_score > 0.95


def test_probe_takes_the_smallest_best_strength_and_fits_train_and_validation(random) -> None:
    train, validation, test = (shifted_classes(random, rows, noise=2.0) for rows in (30, 30, 90))
    strengths = [10.0, 1e-6, 0.1]

    def score(fitted: list, on: tuple, strength: float) -> float:
        """Standardisation by hand, and scikit-learn's regression on it."""
        from sklearn.linear_model import LogisticRegression

        features, labels = (np.concatenate(parts) for parts in zip(*fitted, strict=True))
        mean, deviation = features.mean(0), features.std(0)
        model = LogisticRegression(C=strength, max_iter=5000).fit((features - mean) / deviation, labels)
        return float((model.predict((on[0] - mean) / deviation) == on[1]).mean())

    by_strength = {strength: score([train], validation, strength) for strength in sorted(strengths)}
    best = max(by_strength, key=by_strength.__getitem__)
    result = linear_probe(train, validation, test, strengths=strengths)
    assert result.strength == best
    assert result.validation_score == by_strength[best]
    assert result.score == score([train, validation], test, best)


def test_probe_of_several_labels_per_image(random) -> None:
    def split(rows: int) -> tuple[np.ndarray, np.ndarray]:
        features = random.normal(size=(rows, 4))
        return features, (features[:, :3] > 0.5).astype(np.uint8)

    result = linear_probe(split(200), split(60), split(100), strengths=(1e-3, 10.0))
    assert result.score > 0.9
    assert result.strength == 10.0


@pytest.mark.parametrize(
    ("labels", "strengths", "message"),
    [
        ([0, 1, 0], (), "strengths is empty; give at least one value of C"),
        ([2, 2, 2], (1.0,), "labels of the linear probe have a single class"),
    ],
)
def test_probe_refuses(labels, strengths, message) -> None:
    split = (np.eye(3), np.array(labels))
    with pytest.raises(ValueError, match=message):
        linear_probe(split, split, split, strengths=strengths)
