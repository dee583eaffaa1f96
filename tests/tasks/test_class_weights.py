"""Weights of classes against loops."""

import math

import pytest
import torch

from bissl_hf.tasks.class_weights import resolve_class_weights, weighted_cross_entropy

LABELS = torch.tensor([0, 0, 0, 1, 2, 2])


def test_balanced_weights_give_each_class_the_same_sum():
    weights = resolve_class_weights("balanced", LABELS, 3)
    sums = [float(weights[LABELS[LABELS.eq(number)]].sum()) for number in range(3)]
    assert sums == pytest.approx([2.0, 2.0, 2.0])
    assert float(weights[LABELS].mean()) == pytest.approx(1.0)


def test_the_loss_is_the_loop_and_adds_up_over_parts():
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = resolve_class_weights([0.5, 2.0, 1.0], LABELS, 3)
    expected = 0.0
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        expected += float(weights[label]) * (math.log(sum(map(math.exp, row))) - row[label]) / 6
    assert float(weighted_cross_entropy(logits, LABELS, weights)) == pytest.approx(expected, abs=1e-12)
    parts = [weighted_cross_entropy(logits[rows], LABELS[rows], weights) for rows in (slice(0, 3), slice(3, 6))]
    assert float(sum(parts) / 2) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("equal", "class_weights is 'equal'; it must be balanced or a weight for each class"),
        ([1.0, 2.0], r"class_weights is \[1.0, 2.0\]; it must be 4 finite numbers"),
        ([1.0, -1.0, 1.0, 1.0], "4 finite numbers of at least 0"),
        ("balanced", "class 3 has no training example"),
    ],
)
def test_refuses(given, message):
    with pytest.raises(ValueError, match=message):
        resolve_class_weights(given, LABELS, 4)
