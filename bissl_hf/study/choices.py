"""Which setting of an arm's search is chosen: by the validation split alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def choose(tries: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> int:
    """Returns the number, from 0, of the setting with the best mean metric over its runs; of those with the same one
    the setting with the lowest mean loss, and then the first.

    Args:
        tries (`Sequence[Sequence[Mapping]]`): for each setting the validation figures of its runs, `eval_*`.
        metric (`str`): to be maximised, without `eval_`.

    Raises:
        `ValueError`: if there is nothing to choose from, or the settings have not the same number of runs.
    """
    counts = {len(runs) for runs in tries}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"Settings with {sorted(counts)} runs are compared; each needs the same number, at least 1.")

    def rank(number: int) -> tuple[float, float, int]:
        score, loss = (float(np.mean([run[f"eval_{name}"] for run in tries[number]])) for name in (metric, "loss"))
        if not (math.isfinite(score) and math.isfinite(loss)):
            return -math.inf, -math.inf, -number
        return score, -loss, -number

    chosen = max(range(len(tries)), key=rank)
    if rank(chosen)[0] == -math.inf:
        raise ValueError("No setting has figures that are finite: each of them diverged. Search lower learning rates.")
    return chosen


def describe_choice(
    settings: Sequence[Mapping[str, Any]], tries: Sequence[Sequence[Mapping[str, Any]]], metric: str
) -> dict[str, Any]:
    """Returns what results.json keeps of a choice.

    Args:
        settings (`Sequence[Mapping]`): what was tried.
        tries, metric: see [`choose`].

    Returns:
        `dict`: `metric`; `tries`, each with its `setting` and the `scores` of its runs on the validation split; and
            `chosen`, the number of one, from 0.
    """
    scores = [[run[f"eval_{metric}"] for run in runs] for runs in tries]
    listed = [{"setting": dict(s), "scores": found} for s, found in zip(settings, scores, strict=True)]
    return {"metric": metric, "tries": listed, "chosen": choose(tries, metric)}
