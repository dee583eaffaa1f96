"""Metrics against loops and hand-worked cases, through `evaluate` and as Trainer calls them."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction

from bissl_hf.evaluation import metrics
from bissl_hf.evaluation.metrics import (
    MAIN_METRIC,
    Accuracy,
    ElevenPointMAP,
    MeanClassAccuracy,
    TopKAccuracy,
    classification_metrics,
    eleven_point_map,
)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_accuracy_is_the_fraction_of_right_classes(random: np.random.Generator) -> None:
    predictions, references = random.integers(0, 4, (2, 101))
    found = Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    right = sum(int(p) == int(r) for p, r in zip(predictions, references, strict=True))
    assert found == {"accuracy": right / 101}
    assert 0 < right < 101


def test_accuracy_adds_batches_up(random: np.random.Generator) -> None:
    predictions, references = random.integers(0, 3, (2, 50))
    metric = Accuracy(keep_in_memory=True)
    for rows in (slice(0, 7), slice(7, 50)):
        metric.add_batch(predictions=predictions[rows], references=references[rows])
    assert metric.compute() == {"accuracy": float((predictions == references).mean())}


def test_accuracy_works_with_a_cache_file_too(tmp_path: Path) -> None:
    metric = Accuracy(cache_dir=str(tmp_path))
    assert metric.compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2]) == {"accuracy": 0.75}


def test_accuracy_refuses_lists_of_different_length() -> None:
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        Accuracy(keep_in_memory=True).compute(predictions=[0, 1], references=[0])


def rank(scores: np.ndarray, label: int) -> int:
    """How many classes stand before this one; of equal scores the first class does."""
    return sum(score > scores[label] or (score == scores[label] and c < label) for c, score in enumerate(scores))


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_top_k_counts_those_whose_class_is_among_the_first(random: np.random.Generator, k: int) -> None:
    scores, labels = random.integers(0, 4, (80, 5)).astype(float), random.integers(0, 5, 80)
    found = TopKAccuracy(keep_in_memory=True).compute(predictions=scores, references=labels, k=k)
    assert found == {f"top{k}_accuracy": np.mean([rank(row, y) < k for row, y in zip(scores, labels, strict=True)])}
    if k == 1:
        assert found["top1_accuracy"] == (scores.argmax(1) == labels).mean()


def test_top_k_of_a_hand_worked_case() -> None:
    scores = [[0.1, 0.5, 0.4], [0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]
    compute = TopKAccuracy(keep_in_memory=True).compute
    assert compute(predictions=scores, references=[2, 0, 0], k=2) == {"top2_accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_refuses_more_than_the_classes(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k} for 3 classes; it must be between 1 and their number"):
        TopKAccuracy(keep_in_memory=True).compute(predictions=np.eye(3), references=[0, 1, 2], k=k)


def test_mean_class_accuracy_weighs_classes_alike(random: np.random.Generator) -> None:
    compute = MeanClassAccuracy(keep_in_memory=True).compute
    # Class 0: 3 of 4; class 1: 0 of 1; class 7: 1 of 1. Class 2 is predicted but never right, and does not count.
    found = compute(predictions=[0, 0, 0, 2, 0, 7], references=[0, 0, 0, 0, 1, 7])
    assert found == {"mean_class_accuracy": pytest.approx((3 / 4 + 0 + 1) / 3)}
    predictions, references = random.integers(0, 4, 200), random.choice(4, 200, p=[0.7, 0.1, 0.1, 0.1])
    by_class = [
        sum(p == c for p, r in zip(predictions, references, strict=True) if r == c) / sum(r == c for r in references)
        for c in range(4)
    ]
    found = compute(predictions=predictions, references=references)
    assert found == {"mean_class_accuracy": pytest.approx(sum(by_class) / 4)}


def eleven_points(scores: np.ndarray, labels: np.ndarray) -> float:
    """The definition by loops: every threshold, every recall level, in exact fractions."""
    points = []
    for threshold in scores:
        taken = scores >= threshold
        hits = int((taken & (labels == 1)).sum())
        points.append((Fraction(hits, int(taken.sum())), Fraction(hits, int(labels.sum()))))
    return float(sum(max(p for p, r in points if r >= Fraction(level, 10)) for level in range(11)) / 11)


def test_average_precision_of_a_hand_worked_case() -> None:
    # Ranked: hit, miss, hit, miss. Precision 1 up to recall 1/2 (levels 0 to 0.5), then 2/3 (levels 0.6 to 1).
    found = eleven_point_map(np.array([[0.9], [0.8], [0.7], [0.1]]), np.array([[1], [0], [1], [0]]))
    assert found == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    # The only positive comes last of four: precision 1/4 at every level.
    assert eleven_point_map(np.arange(4.0)[::-1, None], np.array([[0], [0], [0], [1]])) == pytest.approx(1 / 4)


@pytest.mark.parametrize("tied", [False, True])
def test_mean_average_precision_is_the_definition_by_loops(random: np.random.Generator, tied: bool) -> None:
    scores = random.integers(0, 5, (50, 8)).astype(np.float32) if tied else random.normal(size=(50, 8))
    scores = scores.astype(np.float32)
    labels = (random.random((50, 8)) < 0.25).astype(np.int8)
    labels[:10, 0], labels[10:, 0] = 1, 0  # ten positives: recalls of exactly 3/10 and the like
    labels[:, 7] = 0  # a class without examples does not count
    expected = np.mean([eleven_points(scores[:, c].astype(float), labels[:, c]) for c in range(7)])
    metric = ElevenPointMAP(keep_in_memory=True)
    for rows in (slice(0, 21), slice(21, 50)):
        metric.add_batch(predictions=scores[rows], references=labels[rows])
    assert metric.compute() == {"map": pytest.approx(expected, abs=1e-12)}


def test_mean_average_precision_of_scores_that_are_not_finite_is_nan() -> None:
    assert np.isnan(eleven_point_map(np.array([[np.nan], [1.0]]), np.array([[1], [0]])))


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), r"scores have the shape \(3, 2\) and the labels \(3, 1\)"),
        (np.zeros((3, 2)), np.zeros((3, 2)), "No class has a positive example"),
        (np.zeros((2, 2)), np.array([[1, 0], [-1, 1]]), r"Labels hold \[-1\]; each must be 0 or 1"),
    ],
)
def test_mean_average_precision_refuses(scores: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        eleven_point_map(scores, labels)


def test_metrics_of_one_label_take_the_largest_logit(random: np.random.Generator) -> None:
    logits = random.normal(size=(40, 5)).astype(np.float32)
    labels = random.integers(0, 5, 40)
    compute = classification_metrics(num_labels=5)
    found = compute(EvalPrediction(logits, labels))
    right = [max(range(5), key=row.__getitem__) == label for row, label in zip(logits, labels, strict=True)]
    assert found["accuracy"] == sum(right) / 40
    assert set(found) == {"accuracy", "mean_class_accuracy", "macro_f1"}
    # The same function serves one evaluation after the other; nothing of the first may remain.
    assert compute(EvalPrediction(np.eye(3), np.array([0, 1, 0])))["accuracy"] == pytest.approx(2 / 3)


def test_metrics_of_more_than_five_classes_include_the_first_five(random: np.random.Generator) -> None:
    logits, labels = random.normal(size=(90, 6)).astype(np.float32), random.integers(0, 6, 90)
    found = classification_metrics(num_labels=6)(EvalPrediction(logits, labels))
    assert found["top5_accuracy"] == np.mean([rank(row, y) < 5 for row, y in zip(logits, labels, strict=True)])
    assert set(found) == {"accuracy", "top5_accuracy", "mean_class_accuracy", "macro_f1"}
    assert MAIN_METRIC["single_label_classification"] in found


def test_metrics_of_several_labels_are_the_mean_average_precision(random: np.random.Generator) -> None:
    logits = random.normal(size=(40, 5)).astype(np.float32)
    labels = (logits + random.normal(size=(40, 5)) > 1).astype(np.float32)
    found = classification_metrics("multi_label_classification", num_labels=5)(EvalPrediction(logits, labels))
    assert found == {
        "map": pytest.approx(np.mean([eleven_points(s, y) for s, y in zip(logits.T, labels.T, strict=True)]))
    }
    assert MAIN_METRIC["multi_label_classification"] in found


def test_metrics_refuse_another_kind_of_task() -> None:
    with pytest.raises(ValueError, match="problem_type is 'regression'; it must be single_label"):
        classification_metrics("regression")


def test_macro_f1_and_per_class_accuracy_are_those_of_a_loop(random: np.random.Generator) -> None:
    scores, labels = random.normal(size=(60, 6)), random.integers(0, 4, 60)
    predicted = scores.argmax(-1)
    f1, accuracy = [], {}
    for c in range(6):
        hits = sum(p == c == y for p, y in zip(predicted, labels, strict=True))
        f1.append(2 * hits / (sum(predicted == c) + sum(labels == c)))
        if c < 4:
            accuracy["abcdef"[c]] = pytest.approx(hits / sum(labels == c))
    found = metrics.classification_metrics(num_labels=4)(EvalPrediction(scores, labels))
    assert found["macro_f1"] == pytest.approx(np.mean(f1))
    assert metrics.per_class_scores("single_label_classification", scores, labels, "abcdef") == accuracy


def test_per_class_scores_of_several_labels_average_to_the_map(random: np.random.Generator) -> None:
    scores, labels = random.normal(size=(40, 3)), random.integers(0, 2, (40, 3))
    labels[:, 1] = 0
    found = metrics.per_class_scores("multi_label_classification", scores, labels, "abc")
    assert list(found) == ["a", "c"]
    assert np.mean(list(found.values())) == pytest.approx(eleven_point_map(scores, labels))


def test_regression_metrics_are_those_of_their_definitions(random: np.random.Generator) -> None:
    labels = random.normal(size=30)
    found = labels + random.normal(size=30)
    computed = metrics.regression_metrics(EvalPrediction(found[:, None], labels))
    residual = sum((a - b) ** 2 for a, b in zip(found, labels, strict=True))
    assert computed["r2"] == pytest.approx(1 - residual / sum((y - labels.mean()) ** 2 for y in labels))
    assert computed["rmse"] == pytest.approx((residual / 30) ** 0.5)
    assert computed["mae"] == pytest.approx(sum(abs(found - labels)) / 30)
