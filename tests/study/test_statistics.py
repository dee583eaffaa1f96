"""Paired comparisons against formulas written out and numbers worked by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from bissl_hf.study.statistics import compare, holm, paired_difference


def test_a_paired_difference_worked_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3), and with two degrees of freedom the distribution
    function of t is 1/2 + t / (2 sqrt(2 + t^2)); its 97.5 % point is 4.3027."""
    found = paired_difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found["difference"] == pytest.approx(2.0)
    assert found["range"] == [1.0, 3.0]
    t = 2 * math.sqrt(3)
    assert found["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t**2), rel=1e-12)
    assert found["interval"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)], rel=1e-6)


def test_a_paired_difference_is_that_of_the_formula():
    generator = np.random.default_rng(0)
    values, baseline = generator.normal(size=(2, 7))
    differences = values - baseline
    error = differences.std(ddof=1) / math.sqrt(7)
    half = stats.t.ppf(0.975, 6) * error
    found = paired_difference(values.tolist(), baseline.tolist())
    mean = differences.mean()
    assert found["interval"] == pytest.approx([mean - half, mean + half], rel=1e-9)
    assert found["p_value"] == pytest.approx(2 * stats.t.sf(abs(mean / error), 6), rel=1e-9)
    assert found["p_value"] == pytest.approx(stats.ttest_rel(values, baseline).pvalue, rel=1e-12)


@pytest.mark.parametrize(("values", "baseline"), [([0.5], [0.3]), ([0.3, 0.8], [0.1, 0.6]), ([0.1, 0.2], [0.1, 0.2])])
def test_what_is_undefined_is_none(values, baseline):
    found = paired_difference(values, baseline)
    assert found["difference"] == pytest.approx(values[0] - baseline[0])
    assert found["interval"] is None
    assert found["p_value"] is None


def test_values_without_a_partner_are_refused():
    with pytest.raises(ValueError, match="2 values are compared with 1 of the baseline; both need the same seeds"):
        paired_difference([1.0, 2.0], [1.0])


def test_holm_worked_by_hand():
    """Four tests: 0.01 x 4, 0.02 x 3, then 0.03 x 2 = 0.06 and 0.5."""
    assert holm([0.03, 0.01, None, 0.5, 0.02]) == pytest.approx([0.06, 0.04, None, 0.5, 0.06])
    assert holm([0.04, 0.045]) == pytest.approx([0.08, 0.08]), "never below that of a smaller p-value"
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([None]) == [None]


def test_arms_are_compared_seed_by_seed_whatever_their_order():
    scores = {"a": {0: 0.5, 1: 0.6, 2: 0.9}, "b": {2: 0.95, 0: 0.6, 1: 0.61}}
    runs = [
        {"dataset": name, "train_examples": 10, "arm": arm, "seed": seed, "score": value, "metric": "accuracy",
         "features": {"knn": None if name == "y" else value}, "pull": None if arm == "a" else 2.0}
        for name in ("x", "y") for arm, values in scores.items() for seed, value in values.items()
    ]  # fmt: skip
    rows = compare(runs, "a")
    assert [(row["dataset"], row["arm"]) for row in rows] == [("x", "a"), ("x", "b"), ("y", "a"), ("y", "b")]
    assert rows[0]["measures"]["score"]["comparison"] is None
    assert rows[1]["measures"]["score"]["values"] == [0.6, 0.61, 0.95]
    assert rows[1]["measures"]["features/knn"]["mean"] == pytest.approx(0.72)
    assert rows[1]["measures"]["pull"]["comparison"] is None, "the baseline has none"
    assert "features/knn" not in rows[3]["measures"]
    assert rows[1]["measures"]["features/knn"]["comparison"]["holm_p_value"] == pytest.approx(
        rows[1]["measures"]["score"]["comparison"]["p_value"]
    ), "the only comparison of this measure"
    expected = stats.ttest_rel([0.6, 0.61, 0.95], [0.5, 0.6, 0.9]).pvalue
    for row in (rows[1], rows[3]):
        comparison = row["measures"]["score"]["comparison"]
        assert comparison["p_value"] == pytest.approx(expected)
        assert comparison["holm_p_value"] == pytest.approx(min(1.0, 2 * expected))


def test_ten_seeds_of_eight_arms_are_compared_with_one_correction():
    """Eight arms against one, 10 seeds: t intervals with 9 degrees of freedom, whose 97.5 % point is 2.262157, and the
    step-down correction over the eight, written out."""
    generator = np.random.default_rng(3)
    baseline = generator.normal(0.6, 0.02, 10)
    scores = {f"arm{number}": baseline + generator.normal(0.004 * number, 0.01, 10) for number in range(8)}
    runs = [
        {"dataset": "d", "train_examples": 100, "arm": arm, "seed": seed, "metric": "accuracy", "score": float(value)}
        for arm, values in {"plain": baseline, **scores}.items()
        for seed, value in enumerate(values)
    ]
    found = {row["arm"]: row["measures"]["score"]["comparison"] for row in compare(runs, "plain")}
    ordered = sorted(scores, key=lambda arm: found[arm]["p_value"])
    largest = 0.0
    for rank, arm in enumerate(ordered):
        differences = scores[arm] - baseline
        half = 2.262157 * differences.std(ddof=1) / math.sqrt(10)
        assert found[arm]["interval"] == pytest.approx(
            [differences.mean() - half, differences.mean() + half], rel=1e-5
        )
        largest = max(largest, min(1.0, (8 - rank) * found[arm]["p_value"]))
        assert found[arm]["holm_p_value"] == pytest.approx(largest, rel=1e-12)
    assert found["plain"] is None
