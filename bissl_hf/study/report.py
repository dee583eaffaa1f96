"""The report of a study: results.json, table.md and the figures."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints import write_json, write_text
from ..cli.outputs import format_table
from ..evaluation.figures import Panel, plot_differences
from .plan import Arm, Plan
from .sensitivity import points, sensitivity_panels
from .statistics import CONFIDENCE, compare

STUDY_RESULTS = "results.json"
_COMMON = (
    "Same pre-training per seed, same labelled images per seed, same search space and number of trials for all arms. "
    "Hyperparameters were chosen on the validation split; nothing was chosen on the test split."
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
    common = f"{plan.study.pretrain_steps} common pretext steps, then"
    changes = "".join(f", {name} {value}" for name, value in arm.overrides.items())
    if arm.kind == "bissl":
        args = plan.bissl_arguments("unused", 0, arm)
        lower = args.num_alternations * args.lower_steps
        unmatched = "" if lower == plan.matched_steps else f" (not matched: other arms take {plan.matched_steps})"
        upper = args.num_alternations * args.upper_steps
        return f"{common} BiSSL with {lower} lower{unmatched} and {upper} upper steps{changes}"
    if arm.kind == "joint":
        return f"{common} {plan.matched_steps} steps on both losses at once, as many as BiSSL's lower steps{changes}"
    if arm.match == "steps":
        return f"{common} {plan.matched_steps} more, as many as BiSSL takes{changes}"
    clock = "CPU seconds" if plan.study.use_cpu else "seconds"
    return f"{common} as many more as fit into the {clock} that {plan.clock_arm.name} took{changes}"


def write_report(results: Mapping[str, Any], output: Path) -> str:
    """Writes results.json, table.md and the figures: `study.png`, the scores; `alignment.png`, the features before
    fine-tuning; and `sensitivity.png` where arms of BiSSL differ in one setting.

    Args:
        results (`Mapping`): of [`build_results`].
        output (`Path`): the folder.

    Returns:
        `str`: the table and what it rests on, as they are shown to users.
    """
    rows = compare(results["runs"], results["baseline"])
    names = _short_names([row["dataset"] for row in rows])
    rows = [{**row, "set": names[row["dataset"]]} for row in rows]
    scores, features = [_score_cells(row) for row in rows], _without_empty([_feature_cells(row) for row in rows])
    seeds = len(rows[0]["seeds"])
    score_notes = [
        f"Mean and sample deviation over {seeds} seed{'s' if seeds > 1 else ''} on the test split after fine-tuning, "
        "which starts from batch-norm statistics estimated on training images for all arms. The difference to "
        f"{results['baseline']} is paired by seed, with a {100 * CONFIDENCE:.0f} % t interval and the p-value of the "
        "paired t-test, as it is and corrected by Holm for all comparisons of the table; '-' where it is undefined.",
        _COMMON,
        *(f"{arm['arm']}: {arm['how']}." for arm in results["matching"]),
    ]
    feature_notes = [
        "The backbone before fine-tuning, on the test split: 20 nearest neighbours and linear probe among the "
        "labelled images, variance between over variance within classes. Own BN: with the batch-norm statistics as "
        "each arm's training has left them, for the score at the start of fine-tuning.",
        "Pull: of the upper level on the lower one over the whole run. Of the linear solves: residual; cosine of the "
        "solution and the right-hand side, at 1 the identity would do; products. Steps: on the pretext task, the "
        "common ones included.",
    ]
    write_json(output / STUDY_RESULTS, results)
    parts = (("Scores", scores, score_notes), ("Features", features, feature_notes))
    text = "\n\n".join(f"## {title}\n\n{_markdown(cells)}\n\n{_list(notes)}" for title, cells, notes in parts)
    write_text(output / "table.md", f"{text}\n")
    _write_figures(results, rows, output / "figures")
    return "\n".join([format_table(scores), "", *score_notes, "", format_table(features), "", *feature_notes])


def _score_cells(row: Mapping[str, Any]) -> dict[str, str]:
    score = row["measures"]["score"]
    compared = dict.fromkeys(("difference", f"{100 * CONFIDENCE:.0f} % interval", "p", "p (Holm)"), "")
    if comparison := score["comparison"]:
        interval = comparison["interval"]
        bounds = "-" if interval is None else " to ".join(f"{100 * bound:+.2f}" for bound in interval)
        p_values = (comparison[name] for name in ("p_value", "holm_p_value"))
        shown = ("-" if p is None else f"{p:.3f}" for p in p_values)
        compared = dict(zip(compared, (f"{100 * comparison['difference']:+.2f}", bounds, *shown), strict=True))
    metric = row["metric"].replace("map", "11-point mAP")
    return {**_place(row), "test score": _percent(score), "metric": metric, **compared}


def _feature_cells(row: Mapping[str, Any]) -> dict[str, str]:
    measures = row["measures"]
    own = "features_own_statistics"
    columns = {
        "kNN": ("features/knn", _percent),
        "probe": ("features/probe", _percent),
        "between/within": ("features/scatter_ratio", _number),
        "kNN, own BN": (f"{own}/knn", _percent),
        "probe, own BN": (f"{own}/probe", _percent),
        "score, own BN": ("score_own_statistics", _percent),
        "pull": ("pull", _number),
        "residual": ("solver_residual", _number),
        "cosine": ("solver_cosine", _number),
        "products": ("solver_products", _number),
        "steps": ("pretext_steps", lambda summary: f"{summary['mean']:.0f}"),
    }
    shown = {title: show(measures[name]) if name in measures else "-" for title, (name, show) in columns.items()}
    return {**_place(row), **shown}


def _without_empty(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Leaves out the columns in which no row has anything."""
    empty = {title for title in rows[0] if all(row[title] == "-" for row in rows)}
    return [{title: cell for title, cell in row.items() if title not in empty} for row in rows]


def _place(row: Mapping[str, Any]) -> dict[str, str]:
    return {"set": row["set"], "labels": str(row["train_examples"]), "arm": row["arm"]}


def _short_names(datasets: Sequence[str]) -> dict[str, str]:
    """The last part of each folder's path or Hub id; as many more as it takes to tell them apart."""
    paths = {name: name.rstrip("/").split("/") for name in datasets}

    def short(path: list[str]) -> str:
        tails = [path[-length:] for length in range(1, len(path) + 1)]
        others = [other for other in paths.values() if other != path]
        return "/".join(next((t for t in tails if all(o[-len(t) :] != t for o in others)), path))

    return {name: short(path) for name, path in paths.items()}


def _percent(summary: Mapping[str, Any]) -> str:
    deviation = "" if summary["std"] is None else f" ± {100 * summary['std']:.2f}"
    return f"{100 * summary['mean']:.2f}{deviation} %"


def _number(summary: Mapping[str, Any]) -> str:
    return f"{summary['mean']:.3g}"


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _write_figures(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    label = f"Difference to {results['baseline']} (points)"
    scores = _panels(rows, {"score": ""})
    if scores:
        plot_differences(scores, folder / "study.png", label=label, unit="Labelled images")
    if features := _panels(rows, {"features/probe": ", linear probe", "features/knn": ", nearest neighbours"}):
        plot_differences(features, folder / "alignment.png", label=label, unit="Labelled images")
    first = [row for row in rows if _place(row) | {"arm": ""} == _place(rows[0]) | {"arm": ""}]
    if panels := sensitivity_panels(results["settings"], first):
        plot_differences(panels, folder / "sensitivity.png", label=label, unit="Value")


def _panels(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str]) -> list[Panel]:
    """A panel per set and measure, whose names end as given."""
    panels: dict[str, tuple[list[str], dict[str, list[tuple[float, float, float]]]]] = {}
    for row in rows:
        for name, ending in measures.items():
            comparison = row["measures"].get(name, {}).get("comparison")
            if comparison is None:
                continue
            groups, series = panels.setdefault(f"{row['set']}{ending}", ([], {}))
            if str(row["train_examples"]) not in groups:
                groups.append(str(row["train_examples"]))
            series.setdefault(row["arm"], []).append(points(comparison))
    return [(name, groups, list(series.items())) for name, (groups, series) in panels.items()]
