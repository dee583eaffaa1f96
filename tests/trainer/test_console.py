"""The console: one line per log, and the time left."""

import io
import logging
import re
from types import SimpleNamespace
from typing import Any

import pytest

from bissl_hf.trainer import callbacks
from bissl_hf.trainer.callbacks import ShortPrinterCallback, ShortProgressCallback, StepClock, format_log

LEVELS: Any = SimpleNamespace(num_alternations=8, lower_steps=8, upper_steps=4)
ONE: Any = SimpleNamespace()
LOGS = {
    "loss": 2.0, "lower/loss": 3.9151234, "upper/loss": 0.32051, "solver/residual": 1234567.0, "levels/pull": 1.2405,
    "epoch": 1.0, "lower/learning_rate": 0.1,
}  # fmt: skip


def test_an_alternation_is_called_alternation_and_its_line_fits_80_columns():
    line = format_log(LOGS, LEVELS, 8)
    assert line == "alternation 1/8  pretext 3.915  downstream 0.3205  residual 1.235e+06  pull 1.24"
    assert len(line) <= 80
    found = format_log({"eval_loss": 0.1228, "eval_accuracy": 0.951, "eval_runtime": 3.0, "epoch": 1.0}, LEVELS, 8)
    assert found == "alternation 1/8  on validation: accuracy 0.951  loss 0.1228"
    assert format_log({"loss": 5.4, "epoch": 0.5}, ONE, 1) == "epoch 0.5/1  loss 5.4"
    assert format_log({"train_runtime": 3.0}, ONE, 1) is None


def test_the_time_left_weighs_the_phases_by_what_they_take():
    clock = StepClock(LEVELS)
    for _ in range(8):
        clock.add("lower", 1.0)
    assert clock.time_left(8, 96, 8) is None  # no upper step has been seen
    for _ in range(2):
        clock.add("upper", 10.0)
    assert clock.time_left(10, 96, 8) == pytest.approx(2 * 10 + 7 * (8 * 1 + 4 * 10))
    clock.add("between", 5.0)
    assert clock.time_left(12, 96, 7) == pytest.approx(7 * 48 + 7 * 5)
    assert clock.time_left(17, 96, 7) == pytest.approx(3 * 1 + 4 * 10 + 6 * 48 + 7 * 5)
    assert clock.time_left(96, 96, 0) == 0
    assert [clock.phase_of(step) for step in (0, 7, 8, 11, 12)] == ["lower", "lower", "upper", "upper", "lower"]
    other = StepClock(ONE)
    other.add("step", 2.0)
    assert other.time_left(1, 11, 0) == pytest.approx(20.0)


def test_the_clock_counts_phases_and_what_is_between_and_goes_on_after_a_resume(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(callbacks.time, "perf_counter", lambda: now[0])
    args: Any = SimpleNamespace(num_alternations=2, lower_steps=1, upper_steps=1)
    clock, state = StepClock(args), SimpleNamespace(global_step=0)
    clock.on_train_begin(args, state, None)
    for step, seconds in enumerate((1.0, 7.0, 2.0, 8.0)):
        if step % 2 == 0:
            clock.on_epoch_begin(args, state, None)
        now[0] += seconds
        state.global_step = step + 1
        clock.on_step_end(args, state, None)
        if step % 2 == 1:
            clock.on_epoch_end(args, state, None)
            now[0] += 0.5
    clock.on_train_end(args, state, None)
    assert clock.seconds == {"lower": 3.0, "upper": 15.0, "between": 1.0}
    resumed = StepClock(args)
    resumed.load_state_dict(clock.state_dict())
    resumed.on_train_begin(args, SimpleNamespace(global_step=2), None)
    assert resumed.seconds == clock.seconds
    resumed.on_train_begin(args, SimpleNamespace(global_step=0), None)
    assert sum(resumed.seconds.values()) == 0


def make_state(**changes: Any) -> Any:
    return SimpleNamespace(
        is_world_process_zero=True, max_steps=96, global_step=0, epoch=0.0, num_train_epochs=8, **changes
    )


def test_without_a_bar_the_same_line_is_printed(capsys):
    printer = ShortPrinterCallback()
    printer.on_train_begin(LEVELS, make_state(), None)
    printer.on_log(LEVELS, make_state(), None, dict(LOGS))
    printer.on_log(LEVELS, make_state(), None, {"train_runtime": 1.0})
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
