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
        `dict`: `difference`, `interval` (two bounds) and `p_value`. The last two are `None` where they are undefined:
            with fewer than two seeds, or differences that are all the same.

    Raises:
        `ValueError`: if the two are empty or not of one length.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(
            f"{len(values)} values are compared with {len(baseline)} of the baseline; both need the same seeds."
        )
    differences = np.subtract(values, baseline)
    found: dict[str, Any] = {"difference": float(differences.mean()), "interval": None, "p_value": None}
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
        runs (`Sequence[Mapping]`): with `dataset`, `train_examples`, `arm`, `seed`, `score` and `knn_accuracy`.
        baseline (`str`): name of the arm with which the others are compared.

    Returns:
        `list[dict]`: one per set, number of labels and arm, in the order of `runs`: `score` and `knn_accuracy` (mean,
            deviation, values; the latter `None` where it was not measured), and for all but the baseline
            `comparison`, see [`paired_difference`], with `holm_p_value`, corrected for all comparisons here.
    """
    groups: dict[tuple[str, int, str], dict[int, Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["dataset"], run["train_examples"], run["arm"]), {})[run["seed"]] = run
    rows: list[dict[str, Any]] = []
    for (dataset, examples, arm), found in groups.items():
        scores = [found[seed]["score"] for seed in sorted(found)]
        knn = [found[seed]["knn_accuracy"] for seed in sorted(found)]
        row = {
            "dataset": dataset,
            "train_examples": examples,
            "arm": arm,
            "metric": next(iter(found.values()))["metric"],
            "seeds": sorted(found),
            "score": summarise(scores),
            "knn_accuracy": None if None in knn else summarise(knn),
            "comparison": None,
        }
        if arm != baseline:
            others = groups[dataset, examples, baseline]
            row["comparison"] = paired_difference(scores, [others[seed]["score"] for seed in sorted(found)])
        rows.append(row)
    compared = [row["comparison"] for row in rows if row["comparison"] is not None]
    for comparison, p_value in zip(compared, holm([row["p_value"] for row in compared]), strict=True):
        comparison["holm_p_value"] = p_value
    return rows
