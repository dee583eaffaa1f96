"""Accuracy against NumPy, through `evaluate` and as Trainer calls it."""

from pathlib import Path

import numpy as np
import pytest
from transformers import EvalPrediction

from bissl_hf.evaluation.metrics import Accuracy, classification_metrics


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


def test_classification_metrics_takes_the_largest_logit(random: np.random.Generator) -> None:
    logits = random.normal(size=(40, 5)).astype(np.float32)
    labels = random.integers(0, 5, 40)
    compute = classification_metrics()
    right = sum(max(range(5), key=row.__getitem__) == label for row, label in zip(logits, labels, strict=True))
    assert compute(EvalPrediction(logits, labels)) == {"accuracy": right / 40}
    # The same function serves one evaluation after the other; nothing of the first may remain.
    assert compute(EvalPrediction(np.eye(3), np.array([0, 1, 0]))) == {"accuracy": pytest.approx(2 / 3)}
