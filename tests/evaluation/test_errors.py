"""Errors, against loops."""

import numpy as np
import pytest

from bissl_hf.evaluation.errors import confusion_matrix, most_confident_errors, most_confused, softmax

LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 0])
PREDICTED = np.array([0, 1, 1, 0, 2, 0, 0, 1])
CONFIDENCE = np.array([0.9, 0.5, 0.9, 0.7, 0.9, 0.7, 0.8, 0.99])


def test_the_matrix_counts_each_pair():
    counts = np.zeros((4, 4), dtype=int)
    for label, found in zip(LABELS, PREDICTED, strict=True):
        counts[label, found] += 1
    assert (confusion_matrix(LABELS, PREDICTED, 4) == counts).all()


def test_the_most_frequent_errors_come_first_and_there_are_no_others():
    found = most_confused(confusion_matrix(LABELS, PREDICTED, 3), 10)
    assert found == [(0, 1, 2), (2, 0, 2), (1, 0, 1)]
    assert most_confused(confusion_matrix(LABELS, PREDICTED, 3), 1) == [(0, 1, 2)]


def test_the_most_confident_errors_come_first_and_equals_in_their_order():
    assert most_confident_errors(LABELS, PREDICTED, CONFIDENCE, 3) == [7, 6, 3]
    assert most_confident_errors(LABELS, PREDICTED, CONFIDENCE, 20) == [7, 6, 3, 5, 1]
    assert most_confident_errors(LABELS, LABELS, CONFIDENCE, 20) == []


def test_softmax_of_large_logits():
    logits = np.array([[1000.0, 1001.0], [0.0, -2.0]])
    expected = [[1 / (1 + np.e), np.e / (1 + np.e)], [1 / (1 + np.exp(-2)), np.exp(-2) / (1 + np.exp(-2))]]
    assert softmax(logits) == pytest.approx(np.array(expected))
