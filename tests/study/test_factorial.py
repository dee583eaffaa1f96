"""The figure of arms that combine settings."""

from typing import Any

import pytest

from bissl_hf.study.factorial import factorial_panels
from bissl_hf.study.sensitivity import sensitivity_panels
from bissl_hf.study.statistics import compare

GRID = [(solver, pull, gamma) for solver in ("identity", "cg") for pull in (3, 10) for gamma in (1.0, 0.0, 0.1)]


def arms(grid: list[tuple[str, int, float]]) -> dict[str, Any]:
    made = [
        {"name": f"{solver}-{pull}-{gamma}", "kind": "bissl",
         "overrides": {"solver": solver, "proximal_weight": pull, "direct_weight": gamma}}
        for solver, pull, gamma in grid
    ]  # fmt: skip
    return {"bissl": {}, "arms": [{"name": "plain", "kind": "conventional", "overrides": {}}, *made]}


def rows(grid: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    scores = {"plain": 0.5} | {f"{s}-{p}-{g}": 0.5 + 0.01 * p + 0.1 * g + 0.001 * (s == "cg") for s, p, g in grid}
    runs = [
        {"dataset": "d", "train_examples": 9, "arm": name, "seed": seed, "metric": "accuracy", "score": score}
        for name, score in scores.items()
        for seed in (0, 1)
    ]
    return compare(runs, "plain")


def test_numbers_make_the_axis_and_the_panels_and_words_the_series() -> None:
    found = factorial_panels(arms(GRID), rows(GRID))
    assert found is not None
    axis, panels = found
    assert axis == "direct_weight"
    assert [title for title, _, _ in panels] == [f"proximal_weight {pull}, fine-tuned" for pull in (3, 10)]
    _, groups, series = panels[1]
    assert groups == ["0", "0.1", "1"]
    assert [name for name, _ in series] == ["identity", "cg"]
    assert [point[0] for point in series[1][1]] == pytest.approx([10.1, 11.1, 20.1])


def test_there_is_no_figure_where_a_combination_is_missing_or_one_setting_varies() -> None:
    assert factorial_panels(arms(GRID[:-1]), rows(GRID[:-1])) is None
    assert factorial_panels(arms(GRID[:3]), rows(GRID[:3])) is None
    assert factorial_panels(arms([]), rows([])) is None


def test_combined_settings_are_not_taken_for_single_ones() -> None:
    assert sensitivity_panels(arms(GRID), rows(GRID)) == []
