"""Writes a report as one HTML file that needs no network."""

import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..cards.descriptions import describe
from ..cards.record import Settings
from ..checkpoints import write_text
from ..evaluation.errors import confusion_matrix, most_confused
from ..evaluation.metrics import MAIN_METRIC
from ..evaluation.proportions import wilson_interval
from ..optim.pull import GOOD_PULL, TYPICAL_PULL
from ..text import for_html
from .charts import draw_charts
from .record import Evaluated, Report, history_of

REPORT_NAME = "report.html"
_TEMPLATE = Path(__file__).with_name("template.html")
_UNITS = {"aligned": "Alternation"}
_METRICS = {
    "accuracy": "Accuracy",
    "map": "11-point mAP",
    "top5_accuracy": "Top 5",
    "mean_class_accuracy": "Mean of classes",
    "macro_f1": "Macro F1",
    "r2": "R2",
    "mae": "MAE",
    "rmse": "RMSE",
    "loss": "Loss",
}
_REMARKS = {
    "levels/pull": f"{GOOD_PULL:g} to {TYPICAL_PULL:g} did well",
    "knn_accuracy": "nearest neighbours, validation",
}
_NOT_SHARES = ("r2", "mae", "rmse", "loss")
_MAX_MATRIX, _NUM_CONFUSIONS = 12, 12


def write_report(report: Report, folder: Path) -> Path:
    """Writes `report.html` into a folder and returns its path."""
    path = folder / REPORT_NAME
    write_text(path, render_report(report))
    return path


def render_report(report: Report) -> str:
    """Returns the page. All text in it is escaped by [`for_html`], whatever it comes from."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(for_html(value)),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    unit = _UNITS.get(report.run.kind, "Epoch")
    usage = describe(report.run, has_both_levels=report.run.kind == "aligned").usage
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        headline=_headline(report),
        facts=_facts(report),
        settings=_changed({**report.run.settings, **report.settings}),
        outcomes=_outcomes(report),
        charts=draw_charts(history_of(report), unit=unit),
        unit=unit.lower(),
        classes=_classes(report),
        matrix=_matrix(report),
        seconds=_seconds(report.seconds),
        usage=[
            (each.sentence.replace("`", ""), each.code.replace("{model}", report.folder).splitlines())
            for each in usage
        ],
    )


def _headline(report: Report) -> list[tuple[str, str, str]]:
    """Name, value and remark of the figures at the top."""
    found = []
    for before, after in zip([*report.before, *[None] * len(report.after)], report.after, strict=False):
        name = next((name for name in MAIN_METRIC.values() if name in after.metrics), None)
        if name:
            was = f"before {_metric(name, before.metrics[name])}" if before and name in before.metrics else ""
            title = f"{_METRICS[name]}, {after.split} ({after.examples:,} images)"
            found.append((title, _metric(name, after.metrics[name]), was))
    for name, title in (("levels/pull", "Pull over the run"), ("knn_accuracy", "kNN accuracy"), ("loss", "Last loss")):
        values = [row[name] for row in report.run.log_history if name in row]
        if values and not (name == "loss" and found):
            value = _percent(values[-1]) if name == "knn_accuracy" else f"{values[-1]:.3g}"
            found.append((title, value, _REMARKS.get(name, "")))
    if report.seconds:
        found.append(("Time", _duration(sum(report.seconds.values())), f"{report.run.steps:,} steps"))
    return found


def _facts(report: Report) -> list[tuple[str, str]]:
    run = report.run
    models = {"model": "Model", "upper": "Downstream model", "lower": "Pretext model"}
    named = [
        (models.get(name, name), f"{model.class_name}, {model.num_parameters:,} parameters")
        for name, model in run.models.items()
    ]
    processes = f"{run.num_processes} process{'es' if run.num_processes > 1 else ''} on {run.device}"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return [*report.data.items(), *named, ("Machine", processes), ("Versions", versions)]


def _changed(parts: Mapping[str, Settings]) -> list[tuple[str, str, str, str]]:
    """Part, name, value and default of the settings that are not the default."""
    return [
        (part, name, _shown(value), _shown(settings.defaults.get(name)))
        for part, settings in parts.items()
        for name, value in settings.values.items()
        if value != settings.defaults.get(name)
    ]


def _shown(value: Any) -> str:
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == "":
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)


def _outcomes(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of metrics."""
    columns = [part for part in (report.before, report.after, report.beside) if part]
    evaluated = [each for row in zip(*columns, strict=True) for each in row]
    names = [name for name in _METRICS if any(name in each.metrics for each in evaluated)]
    titles = ["Split", "Model", "Images", *(_METRICS[name] for name in names)]
    if "accuracy" in names:
        titles.insert(4, "95 % interval")
    rows = []
    for each in evaluated:
        cells = [_metric(name, each.metrics.get(name)) for name in names]
        if "accuracy" in names:
            cells.insert(1, interval_text(each))
        rows.append([each.split, each.model, f"{each.examples:,}", *cells])
    return titles, rows


def interval_text(evaluated: Evaluated) -> str:
    """Returns the 95 % interval of an accuracy (Wilson) in percent; a dash where there is none."""
    accuracy = evaluated.metrics.get("accuracy", math.nan)
    if not math.isfinite(accuracy) or not evaluated.examples:
        return "-"
    right = round(accuracy * evaluated.examples)
    return " to ".join(f"{100 * bound:.1f}" for bound in wilson_interval(right, evaluated.examples))


def _metric(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4g}" if name in _NOT_SHARES else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _classes(report: Report) -> list[tuple[str, float, float | None, int]]:
    """Name, score after, score before and number of test images of each class, the worst first."""
    labels = report.after[-1].labels if report.after else np.zeros(0, dtype=np.int64)
    counts = np.bincount(labels, minlength=len(report.class_names)) if len(labels) else None
    found = []
    for name, value in report.per_class.items():
        number = 0 if counts is None else int(counts[list(report.class_names).index(name)])
        found.append((name, value, report.per_class_before.get(name), number))
    return sorted(found, key=lambda row: row[1])


def _matrix(report: Report) -> dict[str, Any] | None:
    """The confusion matrix of the test split, whole where it is small, and the most frequent errors."""
    if not report.after or not len(report.after[-1].labels):
        return None
    names, last = list(report.class_names), report.after[-1]
    counts = confusion_matrix(last.labels, last.predicted, len(names))
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    rows = [
        (name, [(int(counts[row, column]), float(shares[row, column])) for column in range(len(names))])
        for row, name in enumerate(names)
    ]
    confused = [(names[row], names[column], count) for row, column, count in most_confused(counts, _NUM_CONFUSIONS)]
    return {"names": names, "rows": rows if len(names) <= _MAX_MATRIX else [], "confused": confused}


def _seconds(parts: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Name, duration and share of the whole of each part."""
    whole = max(sum(parts.values()), 1e-9)
    return [(name, _duration(value), value / whole) for name, value in parts.items()]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"
