"""Figures are files with something in them."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bissl_hf.evaluation.figures import plot_layouts, plot_run, plot_search


def read(path: Path) -> np.ndarray:
    """Returns the pixels, shape (height, width, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_color(pixels: np.ndarray, color: str) -> bool:
    wanted = [int(color[start : start + 2], 16) for start in (1, 3, 5)]
    return bool((pixels == wanted).all(axis=-1).any())


def history(*, residuals: bool) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"epoch": float(epoch), "lower/loss": 3 / epoch, "upper/loss": 2 / epoch, "upper/direct_loss": 1 / epoch}
        for epoch in range(1, 5)
    ]
    if residuals:
        rows = [{**row, "solver/residual": 10 ** -row["epoch"]} for row in rows]
    return [{"epoch": 0.0, "before_accuracy": 0.5}, *rows, {"epoch": 4.0, "train_loss": 0.1}]


# The first two colours of matplotlib's default cycle.
BLUE, ORANGE = "#1f77b4", "#ff7f0e"


@pytest.mark.parametrize("residuals", [True, False])
def test_run_has_a_panel_per_series(residuals: bool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.png"
    plot_run(history(residuals=residuals), path)
    pixels = read(path)
    panels = 3 if residuals else 2
    height, width = pixels.shape[:2]
    assert (height, width) == (495, panels * 510)
    for panel in range(panels):
        part = pixels[:, panel * width // panels : (panel + 1) * width // panels]
        assert has_color(part, BLUE)
        assert has_color(part, ORANGE) == (panel == 1)


def test_run_without_rows_or_with_gaps_is_drawn(tmp_path: Path) -> None:
    plot_run([], tmp_path / "empty.png")
    # The panel beside it has a legend.
    assert not has_color(read(tmp_path / "empty.png")[:, :510], BLUE)
    rows = history(residuals=True)
    del rows[2]["solver/residual"], rows[3]["upper/direct_loss"]
    plot_run(rows, str(tmp_path / "gaps.png"))
    pixels = read(tmp_path / "gaps.png")
    assert pixels.shape[1] == 3 * 510
    assert has_color(pixels[:, :510], BLUE)


@pytest.mark.parametrize("classes", [3, 12, 30])
def test_layouts_show_every_class(classes: int, tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(120, 2))
    labels = np.arange(120) % classes
    names = [f"class {number}" for number in range(classes)]
    plot_layouts([("before", points, labels), ("after", -points, labels)], names, tmp_path / "tsne.png")
    pixels = read(tmp_path / "tsne.png")
    assert pixels.shape == (630, 1440, 3)
    colors = np.unique(pixels.reshape(-1, 3), axis=0)
    vivid = colors[np.ptp(colors.astype(int), axis=1) > 100]
    assert len(vivid) >= min(classes, 10)
    left, right = pixels[:, :600], pixels[:, 600:1200]
    assert has_color(left, BLUE)
    assert has_color(right, BLUE)


def test_figures_are_files_whatever_mplbackend_says_and_names_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["$\\alpha", "a_b^c$", r"\frac{", "cat\x1b[2J"]
    monkeypatch.setenv("MPLBACKEND", "module://no_such_backend")
    plot_layouts(
        [("Before: $ 1", np.random.default_rng(0).normal(size=(8, 2)), np.arange(8) % 4)], names, tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert os.environ["MPLBACKEND"] == "module://no_such_backend"


def test_one_layout(tmp_path: Path) -> None:
    plot_layouts([("only", np.eye(2), np.array([0, 1]))], ["a", "b"], tmp_path / "one.png")
    assert has_color(read(tmp_path / "one.png"), ORANGE)


def test_a_search_is_drawn_with_the_chosen_pair_circled(tmp_path: Path) -> None:
    trials = [
        {"learning_rate": 10.0**-power, "weight_decay": 1e-4 * power, "eval_accuracy": power / 4}
        for power in (1, 2, 3)
    ]
    plot_search(trials, trials[1], "eval_accuracy", tmp_path / "search.png")
    assert has_color(read(tmp_path / "search.png"), "#d62728")
