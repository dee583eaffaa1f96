"""The report of a study: results.json, table.md and the figures."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoints import write_json, write_text
from ..evaluation.figures import Panel, plot_differences, plot_lines
from ..text import format_table
from .arms import Arm
from .curves import mean_curve, settled_at
from .factorial import factorial_panels
from .plan import Plan
from .sensitivity import points, sensitivity_panels
from .statistics import CONFIDENCE, compare
from .tables import Table, feature_tables, place
from .tables import percent as _percent

STUDY_RESULTS = "results.json"
WIDTH = 100  # of what is shown in a terminal
_COMMON = (
    "Same pre-training per seed, same labelled images per seed, same search space and number of trials for all arms. "
    "Hyperparameters were chosen on the validation split{once}; nothing was chosen on the test split."
)
_ONCE = ", once for each arm, set and number of labels, on seeds that are not compared"


def build_results(
    plan: Plan, runs: Sequence[Mapping[str, Any]], choices: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Returns what results.json holds: the settings, how the arms are matched, which settings were tried and chosen
    (see [`Study.choices`]), and the raw result of every run."""
    settings = {**asdict(plan.study), **asdict(plan.views), "arms": [asdict(arm) for arm in plan.study.compared]}
    for name in ("output_dir", "report_only"):
        del settings[name]
    return {
        "settings": settings,
        "baseline": plan.baseline.name,
        "matching": [{"arm": arm.name, "how": _describe(arm, plan)} for arm in plan.study.compared],
        "choices": list(choices),
        "runs": list(runs),
    }


def _describe(arm: Arm, plan: Plan) -> str:
    common = f"{plan.study.pretrain_steps} common pretext steps, then"
    changes = "".join(f", {name} {value}" for name, value in arm.overrides.items() if name != "max_steps")
    if arm.search:
        changes += f", {', '.join(dict.fromkeys(name for each in arm.search for name in each))} by its search"
    if arm.match == "wall_clock":
        clock = "CPU seconds" if plan.study.use_cpu else "seconds"
        both = " on both losses at once" if arm.kind == "joint" else ""
        pace = f", with the settings of {plan.pace_arm(arm).name}" if plan.pace_arm(arm).search else ""
        return f"{common} as many more{both} as fit into the {clock} that {plan.clock_arm.name} took{pace}{changes}"
    if arm.kind == "bissl":
        args = plan.bissl_arguments("unused", 0, arm)
        lower = args.num_alternations * args.lower_steps
        unmatched = "" if lower == plan.matched_steps else f" (not matched: other arms take {plan.matched_steps})"
        upper = args.num_alternations * args.upper_steps
        return f"{common} BiSSL with {lower} lower{unmatched} and {upper} upper steps{changes}"
    own = arm.overrides.get("max_steps")
    if arm.kind == "joint":
        rows = f", reading as many labelled images as the upper steps of {plan.clock_arm.name}"
        as_many = "" if own else ", as many as BiSSL's lower steps"
        matched = rows if arm.match == "rows" else ""
        return f"{common} {own or plan.matched_steps} steps on both losses at once{as_many}{matched}{changes}"
    return (
        f"{common} {own} more{changes}"
        if own
        else f"{common} {plan.matched_steps} more, as many as BiSSL takes{changes}"
    )


def write_report(results: Mapping[str, Any], output: Path) -> str:
    """Writes results.json, table.md and the figures: `study.png`, the scores; `alignment.png`, the features before
    fine-tuning; `sensitivity.png` where arms of BiSSL differ in one setting; `factorial.png` where they combine
    settings; and `curves.png` where the test score was
    recorded in fine-tuning.

    Args:
        results (`Mapping`): of [`build_results`].
        output (`Path`): the folder.

    Returns:
        `str`: the tables and what they rest on, as they are shown to users.
    """
    rows = compare(results["runs"], results["baseline"])
    names = _short_names([row["dataset"] for row in rows])
    rows = [{**row, "set": names[row["dataset"]]} for row in rows]
    tables = [
        Table("Scores", [_score_cells(row) for row in rows], _score_notes(results, rows)),
        *_rival_tables(results, names),
        *_choice_tables(results, names),
        *feature_tables(rows),
    ]
    write_json(output / STUDY_RESULTS, results)
    text = "\n\n".join(f"## {t.title}\n\n{_markdown(t.cells)}\n\n{_list(t.notes)}" for t in tables)
    write_text(output / "table.md", f"{text}\n")
    _write_figures(results, rows, output / "figures")
    shown = [[format_table(t.shown or t.cells), "", *(textwrap.fill(note, WIDTH) for note in t.notes)] for t in tables]
    return "\n\n".join("\n".join(lines) for lines in shown)


def _score_notes(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    seeds = len(rows[0]["seeds"])
    metrics = {row["metric"].replace("map", "11-point mAP") for row in rows}
    return [
        f"Score: {' or '.join(sorted(metrics))} in percent on the test split after fine-tuning, which starts from "
        "batch-norm statistics estimated on training images for all arms; mean and sample deviation over "
        f"{seeds} seed{'s' if seeds > 1 else ''}. The difference to {results['baseline']} is paired by seed, with a "
        f"{100 * CONFIDENCE:.0f} % t interval and the p-value of the paired t-test, as it is and corrected by Holm "
        "for all comparisons of the table; '-' where it is undefined.",
        _COMMON.format(once=_ONCE if results["settings"].get("search_once") else ""),
        *(f"{arm['arm']}: {arm['how']}." for arm in results["matching"]),
    ]


def _rival_tables(results: Mapping[str, Any], names: Mapping[str, str]) -> list[Table]:
    """The differences to a second arm, if the study names one."""
    rival = results["settings"].get("rival")
    if rival is None:
        return []
    rows = [{**row, "set": names[row["dataset"]]} for row in compare(results["runs"], rival)]
    note = f"The differences to {rival}, likewise; p-values are corrected for the comparisons of this table."
    return [Table(f"Differences to {rival}", [_score_cells(row) for row in rows if row["arm"] != rival], [note])]


def _choice_tables(results: Mapping[str, Any], names: Mapping[str, str]) -> list[Table]:
    """What was tried and chosen for each arm, if any arm has a search."""
    choices = results.get("choices", [])
    if not choices:
        return []
    cells = [
        {
            **place({**choice, "set": names[choice["dataset"]]}),
            "setting": ", ".join(f"{name} {value}" for name, value in each["setting"].items()),
            "validation (%)": f"{100 * sum(each['scores']) / len(each['scores']):.2f}",
            "chosen": "yes" if number == choice["chosen"] else "",
        }
        for choice in choices
        for number, each in enumerate(choice["tries"])
    ]
    seeds = len(choices[0]["tries"][0]["scores"])
    note = (
        f"What each arm could choose from, {len(choices[0]['tries'])} settings each, by the mean "
        f"{choices[0]['metric']} on the validation split over {seeds} seed{'s' if seeds > 1 else ''} of their own, "
        "none of which is compared; the test split had no part in it."
    )
    shown = [{name: cell for name, cell in row.items() if name != "chosen"} for row in cells if row["chosen"]]
    return [Table("Settings", cells, [note], shown)]


def _score_cells(row: Mapping[str, Any]) -> dict[str, str]:
    score = row["measures"]["score"]
    compared = dict.fromkeys((f"difference ({100 * CONFIDENCE:.0f} %)", "p", "p (Holm)"), "")
    if comparison := score["comparison"]:
        interval = comparison["interval"]
        bounds = "-" if interval is None else " to ".join(f"{100 * bound:+.2f}" for bound in interval)
        p_values = (comparison[name] for name in ("p_value", "holm_p_value"))
        shown = ("-" if p is None else f"{p:.3f}" for p in p_values)
        compared = dict(zip(compared, (f"{100 * comparison['difference']:+.2f} ({bounds})", *shown), strict=True))
    return {**place(row), "score": _percent(score), **compared}


def _short_names(datasets: Sequence[str]) -> dict[str, str]:
    """The last part of each folder's path or Hub id; more of it where needed to distinguish them."""
    paths = {name: name.rstrip("/").split("/") for name in datasets}

    def short(path: list[str]) -> str:
        tails = [path[-length:] for length in range(1, len(path) + 1)]
        others = [other for other in paths.values() if other != path]
        return "/".join(next((t for t in tails if all(o[-len(t) :] != t for o in others)), path))

    return {name: short(path) for name, path in paths.items()}


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _list(notes: Sequence[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _write_figures(results: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    label = f"Difference to {results['baseline']}\n(points; above 0 is better)"
    seeds = f"n = {len(rows[0]['seeds'])} seeds"
    interval, spread = f"mean and {100 * CONFIDENCE:.0f} % t\ninterval, {seeds}", f"mean and range,\n{seeds}"
    scores = _panels(rows, {"score": ""})
    if scores:
        plot_differences(scores, folder / "study.png", label=label, unit="Labelled images", bars=interval)
    if features := _panels(rows, {"features/probe": ", linear probe", "features/knn": ", nearest neighbours"}):
        plot_differences(features, folder / "alignment.png", label=label, unit="Labelled images", bars=interval)
    if curves := [run for run in results["runs"] if "curve" in run]:
        _plot_curves(curves, {row["dataset"]: row["set"] for row in rows}, folder / "curves.png")
    first = [row for row in rows if place(row) | {"arm": ""} == place(rows[0]) | {"arm": ""}]
    if factorial := factorial_panels(results["settings"], first):
        plot_differences(factorial[1], folder / "factorial.png", label=label, unit=factorial[0], bars=interval)
    if panels := sensitivity_panels(results["settings"], first):
        plot_differences(panels, folder / "sensitivity.png", label=label, unit="Value", bars=spread)


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


def _plot_curves(runs: Sequence[Mapping[str, Any]], names: Mapping[str, str], path: Path) -> None:
    """A panel per set and number of labels, a line per arm: the mean over seeds."""
    panels: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for run in runs:
        panel = panels.setdefault(f"{names[run['dataset']]}, {run['train_examples']} labels", {})
        panel.setdefault(run["arm"], []).append(run)
    drawn = []
    for title, arms in panels.items():
        found = {arm: mean_curve(found) for arm, found in arms.items()}
        lines = [
            (f"{arm} (settled at {settled_at(steps, scores)})", steps, [100 * score for score in scores])
            for arm, (steps, scores) in found.items()
        ]
        drawn.append((title, lines))
    plot_lines(drawn, path, label="Test score (%)", unit="Fine-tuning step")
