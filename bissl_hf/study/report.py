"""The report of a study: results.json, table.md and the figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..cli.outputs import format_table
from ..evaluation.figures import plot_differences
from ..trainer.checkpoints import write_json, write_text
from .plan import Arm, Plan
from .statistics import CONFIDENCE, compare

RESULTS_NAME = "results.json"
_COMMON = (
    "Same pre-training per seed, same labelled images per seed, same search space and number of trials, and in "
    "fine-tuning the same batch norm, for all arms. Hyperparameters were chosen on the validation split; each test "
    "split was read once per run."
)


def build_results(plan: Plan, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns what results.json holds: the settings, how the arms are matched, and the raw result of every run."""
    settings = {**asdict(plan.study), **asdict(plan.views), "arms": [asdict(arm) for arm in plan.study.compared]}
    for name in ("output_dir", "report_only"):
        del settings[name]
    return {
        "settings": settings,
        "baseline": plan.baseline.name,
        "matching": [{"arm": arm.name, "how": _describe(arm, plan)} for arm in plan.study.compared],
        "runs": list(runs),
    }


def _describe(arm: Arm, plan: Plan) -> str:
    common = plan.study.pretrain_steps
    changes = "".join(f", {name} {value}" for name, value in arm.overrides.items())
    if arm.kind == "bissl":
        args = plan.bissl_arguments("unused", 0, arm)
        return (
            f"{common} common pretext steps, then BiSSL with {args.num_alternations * args.lower_steps} lower and "
            f"{args.num_alternations * args.upper_steps} upper steps{changes}"
        )
    if arm.match == "steps":
        return f"{common} common pretext steps, then {plan.matched_steps} more, as many as BiSSL takes{changes}"
    return (
        f"{common} common pretext steps, then as many more as fit into the seconds that {plan.clock_arm.name} "
        f"took{changes}"
    )


def write_report(results: Mapping[str, Any], output: Path) -> str:
    """Writes results.json, table.md and figures/study.png.

    Args:
        results (`Mapping`): of [`build_results`].
        output (`Path`): the folder.

    Returns:
        `str`: the table and what it rests on, as they are shown to users.
    """
    rows = compare(results["runs"], results["baseline"])
    cells = [_cells(row) for row in rows]
    seeds = len(rows[0]["seeds"])
    notes = [
        f"Mean and sample deviation over {seeds} seed{'s' if seeds > 1 else ''} on the test split. The difference to "
        f"{results['baseline']} is paired by seed, with a {100 * CONFIDENCE:.0f} % t interval and the p-value of the "
        "paired t-test, as it is and corrected by Holm for all comparisons of the table; '-' where it is undefined. "
        "kNN: the backbone before fine-tuning, on the validation split.",
        _COMMON,
        *(f"{arm['arm']}: {arm['how']}." for arm in results["matching"]),
    ]
    write_json(output / RESULTS_NAME, results)
    write_text(output / "table.md", f"{_markdown(cells)}\n\n" + "\n".join(f"- {note}" for note in notes) + "\n")
    if panels := _panels(rows):
        plot_differences(
            panels,
            output / "figures" / "study.png",
            label=f"Difference to {results['baseline']} (points)",
            unit="Labelled images",
        )
    return "\n".join([format_table(cells), "", *notes])


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    compared = dict.fromkeys(("difference", f"{100 * CONFIDENCE:.0f} % interval", "p", "p (Holm)"), "")
    if comparison := row["comparison"]:
        interval = comparison["interval"]
        bounds = "-" if interval is None else " to ".join(f"{100 * bound:+.2f}" for bound in interval)
        p_values = (comparison[name] for name in ("p_value", "holm_p_value"))
        shown = ("-" if p is None else f"{p:.3f}" for p in p_values)
        compared = dict(zip(compared, (f"{100 * comparison['difference']:+.2f}", bounds, *shown), strict=True))
    return {
        "set": row["dataset"],
        "labels": str(row["train_examples"]),
        "arm": row["arm"],
        "test score": _mean(row["score"]),
        "metric": row["metric"].replace("map", "11-point mAP"),
        "kNN": _mean(row["knn_accuracy"]) if row["knn_accuracy"] else "-",
        **compared,
    }


def _mean(summary: Mapping[str, Any]) -> str:
    deviation = "" if summary["std"] is None else f" ± {100 * summary['std']:.2f}"
    return f"{100 * summary['mean']:.2f}{deviation} %"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    panels: dict[str, tuple[list[str], dict[str, list[tuple[float, float, float]]]]] = {}
    for row in rows:
        if row["comparison"] is None:
            continue
        groups, series = panels.setdefault(row["dataset"], ([], {}))
        if str(row["train_examples"]) not in groups:
            groups.append(str(row["train_examples"]))
        low, high = row["comparison"]["interval"] or (math.nan, math.nan)
        values = (row["comparison"]["difference"], low, high)
        series.setdefault(row["arm"], []).append(tuple(100 * value for value in values))  # type: ignore[arg-type]
    return [(name, groups, list(series.items())) for name, (groups, series) in panels.items()]
