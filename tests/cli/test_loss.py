"""Downstream tasks from arguments."""

import pytest

from bissl_hf.cli.loss import LossArguments


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), (["balanced"], "balanced"), (["1", "0.5", "2e1"], [1.0, 0.5, 20.0])]
)
def test_class_weights_are_read(given, expected):
    assert LossArguments(given).weights() == expected


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="class_weights is balanced 2; it must be balanced, or a number"):
        LossArguments(["balanced", "2"]).weights()
