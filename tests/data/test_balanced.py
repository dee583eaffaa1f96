"""Rows in which each class is equally often."""

import numpy as np
import pytest
import torch

from bissl_hf.data.alternation import StepKey, Stream, read_rows
from bissl_hf.data.balanced import BalancedRows, row_labels, sampled
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.data.streams import KeyedSource

LABELS = [2, 0, 2, 2, 0, 2, 5, 2]


def images() -> DecodedImages:
    pixels = np.arange(len(LABELS), dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), dtype=np.uint8)
    return DecodedImages(pixels, np.array(LABELS))


def test_each_class_is_equally_often_and_no_row_is_left_out() -> None:
    rows = BalancedRows(images())
    assert len(rows) == 15
    assert [int((rows.labels == number).sum()) for number in (0, 2, 5)] == [5, 5, 5]
    seen = [int(rows[number]["pixel_values"][0, 0, 0]) for number in range(len(rows))]
    assert set(seen) == set(range(len(LABELS)))
    assert (
        [LABELS[row] for row in seen] == rows.labels.tolist() == [row["labels"] for row in read_rows(rows, range(15))]
    )
    # Of a class each row is repeated as often as the others, up to one.
    counts = np.bincount(seen)
    assert abs(int(counts[1]) - int(counts[4])) <= 1
    assert counts[6] == 5


def test_a_stream_of_batches_is_balanced() -> None:
    source = KeyedSource(BalancedRows(images()), 3, torch.utils.data.default_collate, steps_per_alternation=5)
    labels = torch.cat([source.read(StepKey(0, int(Stream.UPPER), 0, step, 0))["labels"] for step in range(5)])
    assert torch.bincount(labels)[[0, 2, 5]].tolist() == [5, 5, 5]


def test_labels_of_plain_rows_are_read() -> None:
    assert row_labels([{"label": 1}, {"labels": 4}]).tolist() == [1, 4]


def test_what_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(ValueError, match="class_sampling is 'rare'; it must be balanced, or be left out"):
        sampled([], "rare")
    several = DecodedImages(np.zeros((2, 3, 2, 2), dtype=np.uint8), np.eye(2, dtype=np.float32))
    with pytest.raises(ValueError, match=r"The labels have the shape \(2, 2\) and the type float32; only rows"):
        sampled(several, "balanced")
    assert sampled(several, None) is several
