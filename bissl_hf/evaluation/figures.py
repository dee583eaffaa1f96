"""Figures of a run, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

SINGLE_WIDTH = 6.4  # inches


def _new_figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure: Figure, path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_run(history: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws the losses of both levels and the residual of the linear solve over alternations.

    Args:
        history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): the PNG file.
    """
    rows = [row for row in history if "lower/loss" in row]
    epochs = [row["epoch"] for row in rows]
    series = [
        ("Pretext loss", [("lower/loss", r"at $\theta_P$")]),
        ("Downstream loss", [("upper/loss", r"at $\theta_P$"), ("upper/direct_loss", r"at $\theta_D$")]),
    ]
    if any("solver/residual" in row for row in rows):
        series.append(("Residual of the linear solve", [("solver/residual", "relative")]))
    figure = _new_figure(3.4 * len(series), 3.0)
    for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(series))), series, strict=True):
        for name, label in lines:
            axes.plot(epochs, [row.get(name, np.nan) for row in rows], marker="o", markersize=3, label=label)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("Alternation")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if title.startswith("Residual"):
            axes.set_yscale("log")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_layouts(
    layouts: Sequence[tuple[str, np.ndarray, np.ndarray]], class_names: Sequence[str], path: str | Path
) -> None:
    """Draws layouts of features side by side, with one legend.

    Args:
        layouts (`Sequence[tuple[str, np.ndarray, np.ndarray]]`): title, points `(rows, 2)` and labels `(rows,)`.
        class_names (`Sequence[str]`): names of the classes; the legend shows at most 20.
        path (`str` or `Path`): the PNG file.
    """
    figure = _new_figure(4.2 * len(layouts) + 1.2, 4.2)
    palette = matplotlib.colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    for axes, (title, points, labels) in zip(np.atleast_1d(figure.subplots(1, len(layouts))), layouts, strict=True):
        for number, name in enumerate(class_names):
            mine = points[labels == number]
            label = name if number < 20 else None
            axes.scatter(mine[:, 0], mine[:, 1], s=9, color=palette(number % palette.N), label=label, linewidths=0)
        axes.set_title(title, fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=2.2, fontsize=9)
    _save(figure, path)
