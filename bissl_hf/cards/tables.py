"""The tables of a model card, in Markdown: settings, evaluations, statistics of a run."""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from typing import Any

from transformers import TrainingArguments

from ..trainer.training_args import default_schedule_options

# Fields of `transformers.TrainingArguments` itself that decide what a run computes.
_COMPUTED = (
    "seed", "data_seed", "bf16", "tf32", "full_determinism", "max_steps", "num_train_epochs", "warmup_steps",
    "optim_args", "lr_scheduler_kwargs", "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip
# Fields of this package's arguments that decide what is seen of a run.
_OBSERVED = ("logging_", "save_", "eval_", "hub_", "push_", "report_")
_UPPER = (
    "learning_rate", "weight_decay", "optim", "optim_args", "max_grad_norm", "per_device_train_batch_size",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "upper_micro_batch_size",
)  # fmt: skip
# Suffixes of what an evaluation reports about itself.
_ABOUT_EVALUATION = ("runtime", "per_second", "preparation_time", "compilation_time")


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


def markdown_table(rows: Sequence[Mapping[str, Any]], *, number_format: str = ".4g") -> str:
    """Returns a table with a column per key; a key that a row lacks is an empty cell. Columns of numbers are
    right-aligned.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): cells by the title of their column.
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
            "Model": f"**{evaluation.model}**" if evaluation.described else evaluation.model,
            "Split": evaluation.split + size,
        }
        rows.append(row | {name.replace("_", " ").capitalize(): value for name, value in evaluation.metrics.items()})
    return markdown_table(rows, number_format=".4f")


def settings_table(arguments: TrainingArguments, others: Mapping[str, Any], *, skip: Collection[str] = ()) -> str:
    """Returns all settings that decide what a run computes and are not the default, or an empty text if all are.

    Args:
        arguments (`TrainingArguments`): those of a trainer of this package.
        others (`Mapping[str, Any]`): further dataclasses, by the part of the run that they belong to.
        skip (`Collection[str]`, *optional*): fields to leave out.
    """
    names = _computing_fields(arguments)
    parts: dict[str, list[dict[str, str]]] = {}
    for field in fields(arguments):
        if field.name in names and field.name not in skip:
            parts.setdefault(_part(field.name, arguments), []).extend(_changed(arguments, field))
    for part, holder in others.items():
        for field in fields(holder):
            if field.name not in skip:
                parts.setdefault(part, []).extend(_changed(holder, field))
    rows = [
        {"Part": part if number == 0 else "", **row}
        for part, changed in sorted(parts.items(), key=_reading_order)
        for number, row in enumerate(changed)
    ]
    return markdown_table(rows) if rows else ""


def _computing_fields(arguments: TrainingArguments) -> set[str]:
    own = {
        name
        for kind in type(arguments).__mro__
        if kind.__module__.split(".")[0] == __package__.split(".")[0]
        for name in vars(kind).get("__annotations__", {})
        if not name.startswith(_OBSERVED)
    }
    computing = own | set(_COMPUTED)
    # These follow from the number of alternations.
    return computing - {"num_train_epochs", "max_steps"} if "num_alternations" in computing else computing


def _part(name: str, arguments: TrainingArguments) -> str:
    if not hasattr(arguments, "num_alternations"):
        return "Training"
    if name in _UPPER:
        return "Upper level"
    lower = name.startswith(("lower_", "per_device_lower_")) and name != "lower_steps"
    return "Lower level" if lower else "Both levels"


def _reading_order(item: tuple[str, Any]) -> int:
    order = ["Both levels", "Training", "Lower level", "Upper level"]
    return order.index(item[0]) if item[0] in order else len(order)


def _changed(holder: Any, field: Field) -> list[dict[str, str]]:
    """Returns the row of a field, or none if it has its default."""
    default = field.default if field.default is not MISSING else None
    if field.default_factory is not MISSING:
        default = field.default_factory()
    value = getattr(holder, field.name)
    if field.name.endswith("lr_scheduler_kwargs") and default is None:
        default = default_schedule_options(getattr(holder, field.name.replace("_kwargs", "_type")))
    if value == default:
        return []
    return [{"Setting": f"`{field.name}`", "Value": _shown(value), "Default": _shown(default)}]


def _shown(value: Any) -> str:
    """A setting as text. Where something lies on this machine is nobody's business."""
    if isinstance(value, Enum):
        value = value.value
    if value is None or value == "":
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return f"`{json.dumps(value, sort_keys=True)}`"
    if isinstance(value, float) and len(str(value)) > 8:
        return f"{value:.4g}"
    text = str(value)
    is_path = os.path.isabs(text) or os.path.isdir(text) or ("/" in text and os.path.exists(text))
    return "a local path" if isinstance(value, str) and is_path else text


def statistics_table(history: Sequence[Mapping[str, Any]], shown: Mapping[str, str], weight: Any) -> str:
    """Returns mean, first and last value of logged figures, or an empty text if none was logged.

    Args:
        history (`Sequence[Mapping]`): `trainer.state.log_history`.
        shown (`Mapping[str, str]`): titles by the names of the figures.
        weight (`Callable[[int, int], int]`): how many values a log averages, from the step of the log before
            and its own.
    """
    rows = []
    for name, title in shown.items():
        logs, previous = [], 0
        for log in history:
            if name in log:
                logs.append((float(log[name]), weight(previous, log["step"])))
                previous = log["step"]
        total = sum(count for _, count in logs)
        if total:
            mean = math.fsum(value * count for value, count in logs) / total
            rows.append({"": title, "Mean": mean, "First log": logs[0][0], "Last log": logs[-1][0]})
    return markdown_table(rows) if rows else ""
