"""How arms that differ in one setting are put in order."""

from typing import Any

import pytest

from bissl_hf.study.sensitivity import PULL, sensitivity_panels
from bissl_hf.study.statistics import compare


def arm(name: str, **overrides: Any) -> dict[str, Any]:
    return {"name": name, "kind": "bissl", "overrides": overrides}


SETTINGS: dict[str, Any] = {
    "bissl": {"proximal_weight": 0.1, "per_device_lower_batch_size": 64},
    "arms": [
        {"name": "plain", "kind": "conventional", "overrides": {}},
        arm("ours"),
        arm("weak", proximal_weight=0.01),
        arm("strong", proximal_weight=1.0),
        arm("rough", solver_max_iterations=20, solver_tolerance=0.5),
        arm("fine", solver_max_iterations=20, solver_tolerance=0.1),
        arm("small", curvature_batch_size=8),
        arm("none", solver="identity"),
    ],
}
SCORES = {
    "plain": 0.5,
    "ours": 0.6,
    "weak": 0.51,
    "strong": 0.55,
    "rough": 0.58,
    "fine": 0.59,
    "small": 0.57,
    "none": 0.59,
}
PULLS = {"ours": 2.0, "weak": 0.2, "strong": 20.0}


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return compare(
        [
            {"dataset": "d", "train_examples": 9, "arm": name, "seed": seed, "metric": "accuracy",
             "score": score + 0.01 * seed * (name != "plain"), "features": {"probe": score / 2},
             "pull": PULLS.get(name, 2.0) if name != "plain" else None}
            for name, score in SCORES.items() for seed in (0, 1)
        ],
        "plain",
    )  # fmt: skip


def test_each_setting_has_a_panel_with_its_values_in_order(rows):
    panels = {title: (groups, dict(series)) for title, groups, series in sensitivity_panels(SETTINGS, rows)}
    assert list(panels) == ["proximal_weight", PULL, "solver_tolerance", "curvature_batch_size"]
    groups, series = panels["proximal_weight"]
    assert groups == ["0.01", "0.1", "1"]
    assert list(series) == ["fine-tuned", "linear probe"]
    assert [point[0] for point in series["fine-tuned"]] == pytest.approx([1.5, 10.5, 5.5])
    assert series["fine-tuned"][0] == pytest.approx((1.5, 1.0, 2.0)), "the range over seeds"
    assert [point[0] for point in series["linear probe"]] == pytest.approx([0.5, 5.0, 2.5])
    assert panels[PULL][0] == ["0.2", "2", "20"]
    assert panels["solver_tolerance"][0] == ["0", "0.1", "0.5"], "the default of the trainer stands for the base"
    assert panels["curvature_batch_size"][0] == ["8", "64"], "by default that of the lower batch"


def test_arms_that_differ_in_what_is_no_number_have_none(rows):
    settings = {**SETTINGS, "arms": [SETTINGS["arms"][0], SETTINGS["arms"][1], SETTINGS["arms"][-1]]}
    assert sensitivity_panels(settings, rows) == []
