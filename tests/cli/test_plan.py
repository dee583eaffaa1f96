"""What a plan says of a run."""

import pytest
import torch
from transformers import TrainerControl, TrainerState

from bissl_hf.benchmark.workload import build_model, build_trainer
from bissl_hf.cli import plan
from bissl_hf.cli.plan import PlannedPart, Stopwatch, format_duration, format_plan, make_plan

from ..benchmark.test_benchmark import TINY


@pytest.fixture
def trainer(tmp_path):
    changes = {"num_alternations": 40, "head_warmup_epochs": 1, "eval_strategy": "steps", "eval_steps": 6}
    return build_trainer(TINY, build_model(TINY), torch.device("cpu"), output_dir=str(tmp_path), **changes)


def test_parts_come_as_often_as_in_the_run_and_two_alternations_are_trained(trainer):
    parts, peak_bytes = make_plan(trainer, test_rows=80)
    assert trainer.state.global_step == 2 * 3
    assert {part.name: part.times for part in parts} == {
        "head warm-up step": 2048 // TINY.upper_batch, "lower step": 40, "upper step": 80,
        "evaluation": 40 * 3 // 6, "evaluation on the test split": 2,
    }  # fmt: skip
    assert all(part.seconds > 0 for part in parts)
    each = {part.name: part.seconds for part in parts}
    assert each["evaluation on the test split"] == pytest.approx(each["evaluation"] * 80 / TINY.evaluation_images)
    assert peak_bytes > 2**20


def test_steps_are_timed_by_level_without_what_comes_between_them(trainer, monkeypatch):
    """A clock by hand: each lower step takes 2 s, each upper one 5 s, an evaluation 11 s, a log 100 s."""
    now = [0.0]
    monkeypatch.setattr(plan.time, "perf_counter", lambda: now[0])
    watch = Stopwatch(torch.device("cpu"), max_steps=6)
    args, state, control = trainer.args, TrainerState(), TrainerControl()

    def after(seconds, event, **values):
        now[0] += seconds
        getattr(watch, event)(args, state, control, **values)

    for step in range(1, 7):
        state.global_step = step
        after(0, "on_epoch_begin") if step % 3 == 1 else None
        after(2 if step % 3 == 1 else 5, "on_step_end")
        assert control.should_training_stop == (step == 6)
    after(100, "on_log", logs={"loss": 1.0})
    after(11, "on_evaluate")
    assert watch.seconds == {"lower step": [2] * 2, "upper step": [5] * 4, "evaluation": [11]}
    assert watch.last("evaluation") == 11
    assert watch.last("checkpoint") == 0


def test_a_plan_adds_up():
    text = format_plan([PlannedPart("a", 2.0, 3), PlannedPart("b", 0.5, 4)], 3 * 2**30)
    assert "75.0 %" in text
    assert "about 8.0 s and 3.0 GiB" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.25, "4.2 s"), (75, "1 min 15 s"), (3600 * 2 + 300, "2 h 05 min"), (86400 * 3 + 3600, "3 d 01 h")],
)
def test_durations_are_shown_in_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text
