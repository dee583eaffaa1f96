"""The tables of a report that are about backbones: their features, their batch norm, and what they took."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Show = Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Table:
    """A table of a report, at most 100 columns wide as text.

    Args:
        title (`str`)
        cells (`Sequence[Mapping[str, str]]`): its rows.
        notes (`Sequence[str]`): sentences below it.
        shown (`Sequence[Mapping[str, str]]`, *optional*): the rows that are shown as text, if not all.
    """

    title: str
    cells: Sequence[Mapping[str, str]]
    notes: Sequence[str]
    shown: Sequence[Mapping[str, str]] = field(default_factory=tuple)


def feature_tables(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Returns the tables of what is known beside the scores; a table or column without a figure is left out.

    Args:
        rows (`Sequence[Mapping]`): see [`compare`], each with `set`, the short name of its data set.
    """
    own = "features_own_statistics"
    tables = [
        (
            "Features",
            {
                "kNN": ("features/knn", percent),
                "probe": ("features/probe", percent),
                "between/within": ("features/scatter_ratio", _number),
            },
            "The backbone before fine-tuning, on the test split, in percent: 20 nearest neighbours and linear probe "
            "among the labelled images; variance between over variance within classes.",
        ),
        (
            "Own batch norm",
            {
                "kNN": (f"{own}/knn", percent),
                "probe": (f"{own}/probe", percent),
                "score": ("score_own_statistics", percent),
            },
            "The same, and the score, with the batch-norm statistics as each arm's training has left them.",
        ),
        (
            "Cost and solves",
            {
                "steps": ("pretext_steps", _whole),
                "pretext": ("pretext_images", _whole),
                "labelled": ("labelled_rows", _whole),
                "CPU s": ("backbone_processor_seconds", _number),
                "pull": ("pull", _number),
                "residual": ("solver_residual", _number),
                "cosine": ("solver_cosine", _number),
                "products": ("solver_products", _number),
            },
            "Steps: on the pretext task, the common ones included. After these: pairs of views and labelled images "
            "that were read, CPU seconds. Pull: of the upper level on the lower one over the whole run. Of the linear "
            "solves: residual; cosine of the solution and the right-hand side, at 1 the identity would do; products.",
        ),
    ]  # fmt: skip
    found = [Table(title, _cells(rows, columns), [note]) for title, columns, note in tables]
    return [table for table in found if len(table.cells[0]) > len(place(rows[0]))]


def _cells(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, Show]]) -> list[dict[str, str]]:
    """The cells of the columns in which any row has something."""
    kept = {title: column for title, column in columns.items() if any(column[0] in row["measures"] for row in rows)}
    return [
        place(row)
        | {
            title: show(row["measures"][name]) if name in row["measures"] else "-"
            for title, (name, show) in kept.items()
        }
        for row in rows
    ]


def place(row: Mapping[str, Any]) -> dict[str, str]:
    """Returns the cells that say what a row is about."""
    return {"set": row["set"], "labels": str(row["train_examples"]), "arm": row["arm"]}


def percent(summary: Mapping[str, Any]) -> str:
    """Returns mean and deviation of a share, in percent."""
    deviation = "" if summary["std"] is None else f" ± {100 * summary['std']:.2f}"
    return f"{100 * summary['mean']:.2f}{deviation}"


def _number(summary: Mapping[str, Any]) -> str:
    return f"{summary['mean']:.3g}"


def _whole(summary: Mapping[str, Any]) -> str:
    return f"{summary['mean']:.0f}"
