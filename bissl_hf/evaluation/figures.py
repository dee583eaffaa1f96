"""Figures of a run, as PNG files."""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..text import for_terminal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Title, names of the groups, and per series its name and one `(value, low, high)` per group.
Panel = tuple[str, Sequence[str], Sequence[tuple[str, Sequence[tuple[float, float, float]]]]]
RESIDUAL_TITLE = "Residual of the linear solve\n(lower is better)"


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of this size in inches."""
    # Half a second that no run should wait for before it trains. MPLBACKEND may name the backend of a notebook that is
    # not installed here; these figures are files and have no use for it.
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _plain(text: object) -> str:
    """Text from outside as it is: escaped dollar signs begin no mathematics, where alone a backslash has a meaning."""
    return for_terminal(text).replace("$", r"\$")


def _save(figure: "Figure", path: str | Path) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_run(history: Sequence[dict[str, Any]], path: str | Path, *, examples: int | None = None) -> None:
    """Draws the score on validation, the losses of both levels and the residual of the linear solve over alternations.

    Args:
        history (`Sequence[dict]`): `trainer.state.log_history`.
        path (`str` or `Path`): the PNG file.
        examples (`int`, *optional*): of the validation split.
    """
    aligned, upper = "aligned model", "upper level"
    panels = [
        ("Validation accuracy\n(higher is better)", [("eval_accuracy", aligned), ("eval_upper_accuracy", upper)]),
        ("Validation mAP\n(higher is better)", [("eval_map", aligned), ("eval_upper_map", upper)]),
        ("Validation R2\n(higher is better)", [("eval_r2", aligned), ("eval_upper_r2", upper)]),
        ("Validation loss\n(lower is better)", [("eval_loss", aligned), ("eval_upper_loss", upper)]),
        ("Pretext loss in training\n(should not rise)", [("lower/loss", "lower level")]),
        ("Downstream loss in training\n(lower is better)", [("upper/loss", aligned), ("upper/direct_loss", upper)]),
        ("Pull so far\n(3 to 10 did well)", [("levels/pull", "so far")]),
        (RESIDUAL_TITLE, [("solver/residual", "relative")]),
    ]
    caption = (
        r"Aligned model: $\theta_P$, the lower level's backbone, with the downstream head; it is what the run writes. "
        r"Upper level: $\theta_D$ with the same head. Alternation 0: the head on the frozen backbone."
    )
    if examples:
        caption += f" n = {examples:,} validation images."
    names = {name for _, lines in panels for name, _ in lines}
    rows = [row for row in history if "epoch" in row and names & row.keys()]
    plot_curves(rows, panels, path, unit="Alternation", caption=caption)


def plot_curves(
    history: Sequence[dict[str, Any]],
    panels: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    path: str | Path,
    *,
    unit: str = "Epoch",
    caption: str = "",
) -> None:
    """Draws figures of a run over its epochs, up to four panels in a row. Those that the run does not have are left
    out.

    Args:
        history (`Sequence[dict]`): `trainer.state.log_history`.
        panels (`Sequence`): titles, each with the lines of its panel: name in the history and label.
        path (`str` or `Path`): the PNG file.
        unit (`str`, *optional*, defaults to `"Epoch"`): what an epoch is called.
        caption (`str`, *optional*): below the panels.
    """
    names = {name for row in history for name in row}
    shown = [(title, [line for line in lines if line[0] in names]) for title, lines in panels]
    shown = [(title, lines) for title, lines in shown if lines] or shown
    rows_of_panels = math.ceil(len(shown) / 4)
    columns = math.ceil(len(shown) / rows_of_panels)
    figure = new_figure(3.4 * columns, 3.0 * rows_of_panels + (0.3 if caption else 0.0))
    grid = figure.subplots(rows_of_panels, columns, squeeze=False).flatten()
    for axes in grid[len(shown) :]:
        axes.remove()
    for axes, (title, lines) in zip(grid, shown, strict=False):
        for name, label in lines:
            rows = [row for row in history if name in row]
            marker = "o" if len(rows) <= 50 else ""
            epochs, values = [row["epoch"] for row in rows], [row[name] for row in rows]
            axes.plot(epochs, values, marker=marker, markersize=3, label=label)
        axes.set_title("\n".join(_plain(line) for line in title.split("\n")), fontsize=11)
        axes.set_xlabel(unit)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if title == RESIDUAL_TITLE:
            axes.set_yscale("log")
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    if caption:
        figure.supxlabel("\n".join(textwrap.wrap(caption, 42 * columns)), fontsize=9)
    _save(figure, path)


def plot_layouts(
    layouts: Sequence[tuple[str, np.ndarray, np.ndarray]], class_names: Sequence[str], path: str | Path
) -> None:
    """Draws layouts of features side by side, four in a row, with one legend.

    Args:
        layouts (`Sequence[tuple[str, np.ndarray, np.ndarray]]`): title, points `(rows, 2)` and labels `(rows,)`.
        class_names (`Sequence[str]`): names of the classes; the legend shows at most 20.
        path (`str` or `Path`): the PNG file.
    """
    from matplotlib import colormaps

    columns = min(len(layouts), 4)
    rows = math.ceil(len(layouts) / columns)
    figure = new_figure(4.2 * columns + 1.2, 4.2 * rows)
    palette = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(layouts) :]:
        axes.remove()
    for axes, (title, points, labels) in zip(panels, layouts, strict=False):
        for number, name in enumerate(class_names):
            mine = points[labels == number]
            label = _plain(name) if number < 20 else None
            axes.scatter(mine[:, 0], mine[:, 1], s=9, color=palette(number % palette.N), label=label, linewidths=0)
        axes.set_title(_plain(title), fontsize=11)
        axes.set_xticks([])
        axes.set_yticks([])
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, markerscale=2.2, fontsize=9)
    _save(figure, path)


def plot_views(samples: Sequence[Sequence[np.ndarray]], path: str | Path) -> None:
    """Draws images (first row) with their views below them, a column per image.

    Args:
        samples (`Sequence[Sequence[np.ndarray]]`): an image and its views each, uint8, shape `(3, height, width)`.
        path (`str` or `Path`): the PNG file.
    """
    rows = len(samples[0])
    figure = new_figure(1.25 * len(samples) + 0.6, 1.25 * rows)
    grid = figure.subplots(rows, len(samples), squeeze=False)
    for row, column in np.ndindex(*grid.shape):
        axes: Any = grid[row, column]
        axes.imshow(samples[column][row].transpose(1, 2, 0))
        axes.set_xticks([])
        axes.set_yticks([])
        if column == 0:
            axes.set_ylabel("image" if row == 0 else f"view {row}", fontsize=10)
    _save(figure, path)


def plot_similarity(values: np.ndarray, names: Sequence[str], path: str | Path, *, title: str) -> None:
    """Draws a matrix of similarities between 0 and 1 as a heat map with its numbers.

    Args:
        values (`np.ndarray`): shape `(checkpoints, checkpoints)`.
        names (`Sequence[str]`): of the rows and columns.
        path (`str` or `Path`): the PNG file.
        title (`str`): above the map.
    """
    side = 1.9 + 0.75 * len(names)
    figure = new_figure(side + 1.0, side)
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis")
    axes.set_xticks(
        range(len(names)),
        [_plain(name) for name in names],
        rotation=30,
        ha="right",
        rotation_mode="anchor",
        fontsize=10,
    )
    axes.set_yticks(range(len(names)), [_plain(name) for name in names], fontsize=10)
    for row, column in np.ndindex(*values.shape):
        color = "white" if values[row, column] < 0.6 else "black"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=color, fontsize=10)
    axes.set_title(_plain(title), fontsize=11)
    figure.colorbar(image, ax=axes, shrink=0.8)
    _save(figure, path)


def plot_differences(panels: Sequence[Panel], path: str | Path, *, label: str, unit: str, bars: str = "") -> None:
    """Draws differences with their intervals around a line at 0, two or three panels in a row, with one scale.

    Args:
        panels (`Sequence[Panel]`): title, names of the groups along the axis, and for each series its name and one
            `(difference, low, high)` per group, in percentage points; the bounds are NaN where there is no interval.
        path (`str` or `Path`): the PNG file.
        label (`str`): of the vertical axis.
        unit (`str`): of the groups.
        bars (`str`, *optional*): what a point and its bar are, above the legend.
    """
    most = max(len(series) for _, _, series in panels)
    width = max(3.2, max(len(groups) for _, groups, _ in panels) * (0.3 + 0.2 * most))
    columns = 2 if len(panels) == 4 else min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(width * columns + 2.0, 3.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes in grid.flatten()[len(panels) :]:
        axes.remove()
    for axes, (title, groups, series) in zip(grid.flatten(), panels, strict=False):
        axes.axhline(0, color="0.3", linewidth=1)
        for number, (name, points) in enumerate(series):
            values, low, high = np.array(points, dtype=float).T
            places = np.arange(len(groups)) + (number - (len(series) - 1) / 2) * min(0.2, 0.7 / len(series))
            around = [(values - low).tolist(), (high - values).tolist()]
            axes.errorbar(places, values, yerr=around, fmt="o", capsize=4, label=_plain(name))
        axes.set_title(_plain(title), fontsize=11)
        axes.set_xticks(range(len(groups)), [_plain(group) for group in groups])
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_xlabel(unit)
        axes.grid(axis="y", alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside right center", frameon=False, fontsize=9, title=bars or None, title_fontsize=9
    )
    _save(figure, path)


def plot_lines(
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[float], Sequence[float]]]]],
    path: str | Path,
    *,
    label: str,
    unit: str,
) -> None:
    """Draws lines, one panel beside the other.

    Args:
        panels (`Sequence`): title, and for each line its name, places and values.
        path (`str` or `Path`): the PNG file.
        label (`str`): of the vertical axis.
        unit (`str`): of the places.
    """
    figure = new_figure(4.2 * len(panels), 3.4)
    for axes, (title, lines) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for name, places, values in lines:
            axes.plot(places, values, marker="o", markersize=3, label=_plain(name))
        axes.set_title(_plain(title), fontsize=11)
        axes.set_xlabel(unit)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def plot_search(trials: Sequence[dict[str, float]], best: dict[str, float], metric: str, path: str | Path) -> None:
    """Draws the pairs that a search has tried, coloured by what came of them, the chosen one circled.

    Args:
        trials (`Sequence[dict]`): with `learning_rate`, `weight_decay` and the metric.
        best (`dict`): the chosen `learning_rate` and `weight_decay`.
        metric (`str`): name of the metric.
        path (`str` or `Path`): the PNG file.
    """
    figure = new_figure(5.2, 3.8)
    axes = figure.subplots()
    names = ("learning_rate", "weight_decay", metric)
    rates, decays, values = ([trial[name] for trial in trials] for name in names)
    points = axes.scatter(rates, decays, c=values, cmap="viridis", s=36)
    axes.scatter(best["learning_rate"], best["weight_decay"], s=160, facecolors="none", edgecolors="tab:red")
    axes.set_title("Search; the chosen pair is circled", fontsize=11)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("Learning rate")
    axes.set_ylabel("Weight decay")
    axes.grid(alpha=0.3)
    figure.colorbar(points, label=metric.replace("_", " ").replace("eval", "validation"))
    _save(figure, path)
