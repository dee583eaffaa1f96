"""The console: one line per log, and the bar."""

import io
import logging
import re
from types import SimpleNamespace
from typing import Any

from bissl_hf.trainer.clocks import StepClock
from bissl_hf.trainer.console import ShortPrinterCallback, ShortProgressCallback, format_log

LEVELS: Any = SimpleNamespace(num_alternations=8, lower_steps=8, upper_steps=4)
ONE: Any = SimpleNamespace(max_steps=-1)
LOGS = {
    "loss": 2.0, "lower/loss": 3.9151234, "upper/loss": 0.32051, "solver/residual": 1234567.0, "levels/pull": 1.2405,
    "epoch": 1.0, "lower/learning_rate": 0.1,
}  # fmt: skip


def test_an_alternation_is_called_alternation_and_its_line_fits_80_columns():
    state = make_state()
    line = format_log(LOGS, LEVELS, state)
    assert line == "alternation 1/8  pretext 3.915  downstream 0.3205  residual 1.235e+06  pull 1.24"
    assert len(line) <= 80
    found = format_log({"eval_loss": 0.1228, "eval_accuracy": 0.951, "eval_runtime": 3.0, "epoch": 1.0}, LEVELS, state)
    assert found == "alternation 1/8  on validation: accuracy 0.951  loss 0.1228"
    assert format_log({"train_runtime": 3.0}, ONE, state) is None


def test_a_run_of_so_many_steps_counts_steps_and_any_other_one_epochs():
    logs = {"loss": 5.4, "epoch": 0.5}
    assert format_log(logs, ONE, make_state()) == "epoch 0.5/8  loss 5.4"
    state = make_state(global_step=10)
    assert format_log(logs, SimpleNamespace(max_steps=96), state) == "step 10/96  loss 5.4"


def make_state(**changes: Any) -> Any:
    fields = {"is_world_process_zero": True, "max_steps": 96, "global_step": 0, "epoch": 0.0, "num_train_epochs": 8}
    return SimpleNamespace(**{**fields, **changes})


def test_without_a_bar_the_same_line_is_printed(capsys):
    printer = ShortPrinterCallback()
    printer.on_train_begin(LEVELS, make_state(), None)
    printer.on_log(LEVELS, make_state(), None, dict(LOGS))
    printer.on_log(LEVELS, make_state(), None, {"train_runtime": 1.0})
    printer.on_train_end(LEVELS, make_state(), None)
    printer.on_log(LEVELS, make_state(), None, dict(LOGS))
    *legend, line = capsys.readouterr().out.splitlines()
    assert line.startswith("alternation 1/8  pretext 3.915")
    assert any("residual" in row for row in legend)


def test_the_bar_has_the_time_left_and_messages_above_it(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    clock, state = StepClock(LEVELS), make_state()
    bar = ShortProgressCallback(clock)
    bar.on_train_begin(LEVELS, state, None)
    text = io.StringIO()
    bar.training_bar.fp = text
    state.global_step = 1
    clock.add("lower", 1.0)
    bar.on_step_end(LEVELS, state, None)
    assert "time left after the first alternation" in str(bar.training_bar)
    clock.add("upper", 1.0)
    state.global_step = 2
    bar.on_step_end(LEVELS, state, None)
    assert "01:34 left" in str(bar.training_bar)
    logging.getLogger("bissl_hf.some").warning("Raise damping, " + "word " * 40)
    bar.on_train_end(LEVELS, state, None)
    shown = capsys.readouterr().err
    assert "Raise damping, word" in shown
    assert max(map(len, re.findall(r"(?:word ?)+", shown))) <= 100
    assert logging.getLogger("bissl_hf").handlers == []
