"""Intervals against scipy and against their exact coverage."""

from itertools import product
from math import comb

import numpy as np
import pytest
from scipy import stats

from bissl_hf.evaluation.proportions import compare_paired, wilson_interval


@pytest.mark.parametrize(("successes", "examples"), [(0, 1), (1, 1), (7, 12), (0, 30), (359, 359), (300, 359)])
def test_wilson_is_that_of_scipy(successes, examples):
    found = stats.binomtest(successes, examples).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, examples) == pytest.approx((found.low, found.high), abs=1e-12)


@pytest.mark.parametrize(("successes", "examples"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_refuses_what_is_no_proportion(successes, examples):
    with pytest.raises(ValueError, match=f"{successes} successes of {examples} examples"):
        wilson_interval(successes, examples)


def results(gained: int, lost: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [(0, 1)] * gained + [(1, 0)] * lost + [(1, 1)] * both + [(0, 0)] * neither
    first, second = np.array(rows).T
    return first, second


def test_a_difference_counts_the_images_on_which_the_two_differ():
    found = compare_paired(*results(12, 4, 300, 43))
    assert (found.gained, found.lost, found.examples) == (12, 4, 359)
    assert found.difference == pytest.approx(8 / 359)
    assert found.p_value == pytest.approx(2 * sum(comb(16, k) for k in range(5)) / 2**16)
    up, down, total = 13 / 361, 5 / 361, 361
    half = 1.959963984540054 * ((up + down - (up - down) ** 2) / total) ** 0.5
    assert (found.low, found.high) == pytest.approx((up - down - half, up - down + half))
    assert found.is_clear == (found.low > 0)
    same = compare_paired(*results(0, 0, 5, 5))
    assert (same.p_value, same.is_clear) == (1.0, False)


@pytest.mark.parametrize(("up", "down"), [(0.1, 0.1), (0.25, 0.05), (0.02, 0.02), (0.4, 0.1)])
def test_the_interval_covers_the_true_difference_about_95_times_in_100(up, down):
    total, covered = 40, 0.0
    for gained, lost in product(range(total + 1), repeat=2):
        if gained + lost <= total:
            rest = total - gained - lost
            probability = comb(total, gained) * comb(total - gained, lost) * up**gained * down**lost
            probability *= (1 - up - down) ** rest
            if probability > 1e-9:
                found = compare_paired(*results(gained, lost, rest, 0))
                covered += probability * (found.low <= up - down <= found.high)
    assert 0.93 <= covered <= 1


def test_both_need_the_same_images():
    with pytest.raises(ValueError, match=r"\(2,\) results are compared with \(3,\); both need the same images"):
        compare_paired(np.ones(2), np.ones(3))
