"""Paired comparisons of arms over seeds."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..cli.finetuning import summarise

CONFIDENCE = 0.95


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """Compares two arms seed by seed: the mean difference, its t confidence interval and the p-value of the two-sided
    paired t-test.

    Args:
        values, baseline (`Sequence[float]`): of the same seeds, in the same order.

    Returns:
        `dict`: `difference`, `range` (smallest and largest), `interval` (two bounds) and `p_value`. The last two are
            `None` where they are undefined: with fewer than two seeds, or differences that are all the same.

    Raises:
        `ValueError`: if the two are empty or not of one length.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(
            f"{len(values)} values are compared with {len(baseline)} of the baseline; both need the same seeds."
        )
    differences = np.subtract(values, baseline)
    found: dict[str, Any] = {
        "difference": float(differences.mean()),
        "range": [float(differences.min()), float(differences.max())],
        "interval": None,
        "p_value": None,
    }
    # Rounding leaves differences that should be equal some 1e-16 apart.
    if len(values) > 1 and np.ptp(differences) > 1e-12 * max(1.0, np.abs(differences).max()):
        test = stats.ttest_rel(values, baseline)
        low, high = test.confidence_interval(CONFIDENCE)
        found |= {"interval": [float(low), float(high)], "p_value": float(test.pvalue)}
    return found


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Corrects p-values for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979).

    Args:
        p_values (`Sequence`): those that are `None` are not counted and stay `None`.
    """
    order = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[index] = largest
    return corrected


def compare(runs: Sequence[Mapping[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Summarises the runs of a study.

    Args:
        runs (`Sequence[Mapping]`): with `dataset`, `train_examples`, `arm`, `seed`, `metric` and the measures of a
            run: all other numbers, also those in mappings, whose names then are `outer/inner`.
        baseline (`str`): name of the arm with which the others are compared.

    Returns:
        `list[dict]`: one per set, number of labels and arm, in the order of `runs`, with `dataset`, `train_examples`,
            `arm`, `metric`, `seeds` and `measures`: for each measure that all its runs have mean, deviation, values,
            and `comparison` with the baseline (see [`paired_difference`], and `holm_p_value`, corrected for all
            comparisons of this measure); `None` where there is none.
    """
    groups: dict[tuple[str, int, str], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["dataset"], run["train_examples"], run["arm"]), {})[run["seed"]] = run
    rows = [
        {
            "dataset": dataset,
            "train_examples": examples,
            "arm": arm,
            "metric": next(iter(found.values()))["metric"],
            "seeds": sorted(found),
            "measures": _measures([found[seed] for seed in sorted(found)]),
        }
        for (dataset, examples, arm), found in groups.items()
    ]
    baselines = {(row["dataset"], row["train_examples"]): row for row in rows if row["arm"] == baseline}
    comparisons: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for name, measure in row["measures"].items():
            other = baselines[row["dataset"], row["train_examples"]]["measures"].get(name)
            measure["comparison"] = None
            if row["arm"] != baseline and other is not None:
                measure["comparison"] = paired_difference(measure["values"], other["values"])
                comparisons.setdefault(name, []).append(measure["comparison"])
    for compared in comparisons.values():
        for comparison, p_value in zip(compared, holm([found["p_value"] for found in compared]), strict=True):
            comparison["holm_p_value"] = p_value
    return rows


def _measures(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    flat = [_flatten(run) for run in runs]
    names = [name for name in flat[0] if all(isinstance(run.get(name), int | float) for run in flat)]
    return {name: summarise([run[name] for run in flat]) for name in names if name not in ("train_examples", "seed")}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat
