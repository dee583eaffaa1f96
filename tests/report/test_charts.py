"""Which charts a history has."""

import base64
import os
import subprocess
import sys

import pytest

from bissl_hf.report.charts import CURVES, draw_charts
from bissl_hf.report.record import history_of

from .made import made_report, made_run


def test_a_chart_for_each_figure_that_was_logged_twice() -> None:
    charts = draw_charts(history_of(made_report()), unit="Alternation")
    titles = [chart.title for chart in charts]
    assert titles[0] == "Accuracy on validation"
    assert {"Pull", "Residual of the linear solve", "Agreement of the tasks", "Distances"} <= set(titles)
    assert "Training loss" not in titles  # each level has its own
    assert "Effective rank of the features" not in titles
    for chart in charts:
        content = base64.b64decode(chart.image.partition("base64,")[2])
        assert b"<svg" in content
        assert len(chart.explanation) > 40
    assert draw_charts(history_of(made_report())[:2], unit="Alternation") == []


def test_the_same_run_has_the_same_pictures() -> None:
    first, second = (draw_charts(made_run().log_history, unit="Alternation") for _ in range(2))
    assert first == second


def test_alternation_0_comes_first() -> None:
    history = history_of(made_report())
    assert history[0] == {"epoch": 0.0, "eval_accuracy": 0.66}


@pytest.mark.parametrize("name", ["rankme", "knn_accuracy", "loss"])
def test_runs_on_one_loss(name: str) -> None:
    charts = draw_charts([{"epoch": float(n), name: 0.1 * n} for n in range(3)], unit="Epoch")
    (curve,) = [curve for curve in CURVES if name in curve.lines]
    assert [chart.title for chart in charts] == [curve.title]


def test_pictures_need_no_backend_of_a_screen() -> None:
    """MPLBACKEND may name one that matplotlib refuses when it is imported."""
    code = """
import sys
from bissl_hf.report.charts import draw_charts
assert "matplotlib" not in sys.modules, "half a second that no command should wait for before it trains"
print(len(draw_charts([{"epoch": float(n), "rankme": 1.0 / n} for n in (1, 2, 3)], unit="Epoch")))
"""
    environment = {**os.environ, "MPLBACKEND": "no such backend"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr
