"""Clocks: what the phases of a run take, and what is left."""

from types import SimpleNamespace
from typing import Any

import pytest

from bissl_hf.trainer import clocks
from bissl_hf.trainer.clocks import StepClock

LEVELS: Any = SimpleNamespace(num_alternations=8, lower_steps=8, upper_steps=4)
ONE: Any = SimpleNamespace()


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
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
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
