"""The tables of a model card, in Markdown: settings and evaluations."""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ..text import for_markdown, markdown_code
from .record import Settings

# Suffixes of what an evaluation reports about itself.
_ABOUT_EVALUATION = ("runtime", "per_second", "preparation_time", "compilation_time")
_LEVEL_NAMES = {"aligned": "The aligned model", "upper": "The upper level's model"}


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a model on a split.

    Args:
        model (`str`): which model, for people.
        split (`str`): the split of the labelled data set, such as `"test"`.
        metrics (`Mapping[str, float]`): by names without prefix, such as `"accuracy"`.
        examples (`int`, *optional*): rows of the split.
        described (`bool`, *optional*, defaults to `True`): whether it is the model that the card describes.
    """

    model: str
    split: str
    metrics: Mapping[str, float]
    examples: int | None = None
    described: bool = True


def metrics_under(report: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Returns the metrics in what `Trainer.evaluate` returns or logs, by names without the prefix.

    Args:
        report (`Mapping`): numbers by names such as `"eval_accuracy"`; those of other prefixes are left out, and so
            is how long the evaluation took.
        prefix (`str`): such as `"eval"`.
    """
    named = {name.removeprefix(f"{prefix}_"): value for name, value in report.items() if name.startswith(f"{prefix}_")}
    return {
        name: float(value)
        for name, value in named.items()
        if isinstance(value, int | float) and not name.endswith(_ABOUT_EVALUATION) and not name.startswith("upper_")
    }


def evaluations_of_levels(
    split: str, metrics: Mapping[str, Mapping[str, float]], examples: int | None, *, exported: str
) -> list[Evaluation]:
    """Returns the evaluations of both models of a run, the one that is saved first. One without metrics is left out.

    Args:
        split (`str`): the split of the labelled data set.
        metrics (`Mapping`): of `aligned` and `upper`, by name.
        examples (`int`, *optional*): rows of the split.
        exported (`str`): the level that is saved.
    """
    names = {level: "This model" if level == exported else name for level, name in _LEVEL_NAMES.items()}
    return [
        Evaluation(names[level], split, metrics[level], examples, described=level == exported)
        for level in sorted(names, key=lambda level: level != exported)
        if metrics[level]
    ]


def markdown_table(rows: Sequence[Mapping[str, Any]], *, number_format: str = ".4g") -> str:
    """Returns a table with a column per key; a key that a row lacks is an empty cell. Columns of numbers are
    right-aligned.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): cells by the title of their column, both Markdown.
        number_format (`str`, *optional*, defaults to `".4g"`): of numbers that are no integers.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    aligned = ["--:" if all(isinstance(row.get(name, 0), int | float) for row in rows) else "---" for name in columns]
    cells = [[_cell(row.get(name, ""), number_format) for name in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, aligned, *cells])


def _cell(value: Any, number_format: str) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    text = format(value, number_format) if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def evaluation_table(evaluations: Sequence[Evaluation]) -> str:
    """Returns the evaluations as a table; the model of the card is printed in bold."""
    rows = []
    for evaluation in evaluations:
        size = "" if evaluation.examples is None else f" ({evaluation.examples:,})"
        row: dict[str, Any] = {
            "Model": f"**{for_markdown(evaluation.model)}**"
            if evaluation.described
            else for_markdown(evaluation.model),
            "Split": for_markdown(evaluation.split) + size,
        }
        rows.append(row | {metric_title(name): value for name, value in evaluation.metrics.items()})
    return markdown_table(rows, number_format=".4f")


def metric_title(name: str) -> str:
    """Returns the name of a metric as the title of a column, in Markdown."""
    return for_markdown(name.replace("_", " ").capitalize())


def settings_table(parts: Mapping[str, Settings], *, skip: Collection[str] = ()) -> str:
    """Returns the settings that are not the default as a table, or an empty text if all are.

    Args:
        parts (`Mapping[str, Settings]`): by the part of the run that they belong to.
        skip (`Collection[str]`, *optional*): names to leave out.
    """
    rows = []
    for part, settings in parts.items():
        changed = [
            {"Setting": markdown_code(name), "Value": _shown(value), "Default": _shown(settings.defaults.get(name))}
            for name, value in settings.values.items()
            if name not in skip and value != settings.defaults.get(name)
        ]
        rows += [{"Part": for_markdown(part) if number == 0 else "", **row} for number, row in enumerate(changed)]
    return markdown_table(rows) if rows else ""


def _shown(value: Any) -> str:
    """A setting as Markdown. Paths of this machine are not given."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == "":
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return markdown_code(json.dumps(value, sort_keys=True, default=str))
    if isinstance(value, float) and len(str(value)) > 8:
        return f"{value:.4g}"
    text = str(value)
    is_path = os.path.isabs(text) or os.path.isdir(text) or ("/" in text and os.path.exists(text))
    return "a local path" if isinstance(value, str) and is_path else for_markdown(text)
