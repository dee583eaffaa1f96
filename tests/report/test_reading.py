"""What figures mean, at their bounds."""

import numpy as np
import pytest

from bissl_hf.evaluation.proportions import compare_paired
from bissl_hf.report.reading import (
    LEGEND,
    explain_difference,
    explain_end,
    explain_pull,
    explain_residual,
    judge_difference,
)


@pytest.mark.parametrize(
    ("pull", "part"), [(0.1, "hardly"), (0.5, "weakly"), (2.9, "weakly"), (3, "did well"), (10, "did well"),
     (11, "closely")]
)  # fmt: skip
def test_pull(pull, part):
    assert part in explain_pull(pull)


@pytest.mark.parametrize(("residual", "part"), [(0.01, "closely."), (0.5, "roughly"), (2.7, "worse than none")])
def test_residual(residual, part):
    assert part in explain_residual(residual)


def test_the_end_of_a_run():
    history = [{"levels/pull": 1.0}, {"levels/pull": 4.0, "solver/residual": 0.01}, {"eval_loss": 1.0}]
    assert [sentence.partition(" ")[0] for sentence in explain_end(history)] == ["Pull", "Residual"]
    assert explain_end([{"loss": 1.0}]) == []


def pair(gained: int, lost: int):
    first = np.array([0] * gained + [1] * lost + [1] * 100)
    return compare_paired(first, np.array([1] * gained + [0] * lost + [1] * 100))


def test_a_difference_within_its_interval_and_one_that_the_pull_cannot_have_caused():
    clear, unclear = pair(30, 2), pair(4, 3)
    assert "holds 0" not in " ".join(judge_difference(clear, 5.0))
    assert "holds 0" in " ".join(judge_difference(unclear, 5.0))
    assert "no difference is due to BiSSL" in " ".join(judge_difference(clear, 0.1))
    assert "little part" in " ".join(judge_difference(clear, 1.0))
    assert len(judge_difference(clear, None)) == len(judge_difference(clear, 5.0)) == 1
    assert "30 gained, 2 lost" in explain_difference(clear)


def test_the_legend_fits_80_columns():
    assert max(map(len, LEGEND.splitlines())) <= 80
