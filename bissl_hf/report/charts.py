"""The curves of a run, one picture each, with what they show and which way they should go."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..evaluation.figures import new_figure
from ..optim.pull import GOOD_PULL
from .pictures import data_uri


@dataclass(frozen=True)
class Curve:
    """A chart of figures of the history.

    Args:
        title, axis (`str`): what is drawn, and the name of the vertical axis.
        lines (`Mapping[str, str]`): labels by name in the history.
        explanation (`str`): what is shown and which way is better.
        is_logarithmic (`bool`, *optional*, defaults to `False`)
        of_pair (`str`, *optional*): further sentences, where a run has two levels.
        marks (`Mapping[float, str]`, *optional*): horizontal lines with their meaning.
    """

    title: str
    axis: str
    lines: Mapping[str, str]
    explanation: str
    is_logarithmic: bool = False
    of_pair: str = ""
    marks: Mapping[float, str] | None = None


@dataclass(frozen=True)
class Chart:
    """A chart as it is shown: a data URI with its title and explanation."""

    title: str
    image: str
    explanation: str


_ALIGNED, _UPPER = "aligned model (theta_P)", "downstream model (theta_D)"
CURVES = (
    Curve(
        "Accuracy on validation",
        "accuracy",
        {"eval_accuracy": _ALIGNED, "eval_upper_accuracy": _UPPER},
        "Higher is better.",
        of_pair="The aligned model, the lower level's backbone with the downstream head, is what the run writes; the "
        "other is the upper level's own. Alternation 0 is the head trained on the frozen backbone.",
    ),
    Curve(
        "11-point mAP on validation",
        "mAP",
        {"eval_map": _ALIGNED, "eval_upper_map": _UPPER},
        "Mean average precision; higher is better.",
        of_pair="Alternation 0 is the head trained on the frozen backbone.",
    ),
    Curve(
        "R2 on validation",
        "R2",
        {"eval_r2": _ALIGNED, "eval_upper_r2": _UPPER},
        "Share of the variance that is explained: higher is better, 0 is a constant.",
        of_pair="Alternation 0 is the head trained on the frozen backbone.",
    ),
    Curve(
        "Loss on validation",
        "loss",
        {"eval_loss": _ALIGNED, "eval_upper_loss": _UPPER},
        "Lower is better. If it rises while the training loss falls, the labelled images are being learned by heart.",
    ),
    Curve(
        "Pretext loss",
        "loss",
        {"lower/loss": "lower level (theta_P)"},
        "Loss of the pretext task on unlabelled images. It should fall, or stay level after long pre-training; a "
        "strong pull may raise it a little.",
    ),
    Curve(
        "Downstream loss in training",
        "loss",
        {"upper/loss": _ALIGNED, "upper/direct_loss": _UPPER},
        "On labelled training batches; lower is better. The distance of the lines is what the lower level has not "
        "taken over.",
    ),
    Curve(
        "Training loss",
        "loss",
        {"loss": "training"},
        "Mean over the steps since the last log; it should fall.",
    ),
    Curve(
        "Pull",
        "pull so far",
        {"levels/pull": "so far"},
        "How far the lower level has been drawn towards the upper one, added up over its steps. At the end 3 to 10 "
        "did well; below 0.5 the upper level has had next to no effect.",
        marks={GOOD_PULL: "did well from here"},
    ),
    Curve(
        "Residual of the linear solve",
        "relative residual",
        {"solver/residual": "relative"},
        "Error of the implicit gradient's linear system, relative to its right-hand side. Lower is better: below 0.1 "
        "the solve is close, above 1 it is worse than none.",
        is_logarithmic=True,
        marks={1.0: "no solve"},
    ),
    Curve(
        "Agreement of the tasks",
        "cosine",
        {"alignment/cosine": "cosine of both gradients at theta_P"},
        "Cosine between the gradients of the pretext and the downstream loss in the shared backbone. Above 0 a step "
        "on the one helps the other, below 0 it harms it; near 0 they have little to do with each other.",
        marks={0.0: ""},
    ),
    Curve(
        "Distances",
        "relative distance",
        {"levels/distance": "theta_P to theta_D", "levels/moved": "theta_P to its start"},
        "Relative to the norm of theta_P. The levels should not drift apart without end.",
    ),
    Curve(
        "Nearest neighbours on validation",
        "kNN accuracy",
        {"knn_accuracy": "kNN accuracy"},
        "How many validation images have the class of their nearest training images by the backbone's features alone. "
        "Higher is better; it does not depend on a head.",
    ),
    Curve(
        "Effective rank of the features",
        "RankMe (dimensions)",
        {"rankme": "RankMe"},
        "How many dimensions the features of validation images use (RankMe); it compares at equal numbers of images "
        "only. A fall to a few is a collapse.",
    ),
)


def draw_charts(history: Sequence[Mapping[str, Any]], *, unit: str, curves: Sequence[Curve] = CURVES) -> list[Chart]:
    """Returns the charts of what a history has at two or more places.

    Args:
        history (`Sequence[Mapping]`): rows with `epoch`.
        unit (`str`): what an epoch is called.
        curves (`Sequence[Curve]`, *optional*): what to look for.
    """
    two_levels = any("lower/loss" in row for row in history)
    charts = []
    for curve in curves:
        lines = [
            (label, [(row["epoch"], float(row[name])) for row in history if isinstance(row.get(name), int | float)])
            for name, label in curve.lines.items()
        ]
        lines = [(label, points) for label, points in lines if len(points) > 1]
        # With two levels the loss of a step is that of either, of which each has a chart of its own.
        if lines and not (two_levels and list(curve.lines) == ["loss"]):
            explanation = f"{curve.explanation} {curve.of_pair}".strip() if two_levels else curve.explanation
            charts.append(Chart(curve.title, _draw(curve, lines, unit), explanation))
    return charts


def _draw(curve: Curve, lines: Sequence[tuple[str, Sequence[tuple[float, float]]]], unit: str) -> str:
    figure = new_figure(4.6, 2.9)
    from matplotlib import rc_context
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    for label, points in lines:
        places, values = zip(*points, strict=True)
        axes.plot(places, values, marker="o" if len(points) <= 50 else "", markersize=4, linewidth=1.8, label=label)
    if curve.is_logarithmic:
        axes.set_yscale("log")
    for height, text in (curve.marks or {}).items():
        low, high = axes.get_ylim()
        if low <= height <= high:
            axes.axhline(height, color="0.45", linewidth=1, linestyle="--", label=text or None)
    axes.set_xlabel(unit)
    axes.set_ylabel(curve.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": curve.title}):  # the same file for the same run
        figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")
