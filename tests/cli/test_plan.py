"""What a plan says of a run."""

import pytest
import torch

from bissl_hf.benchmark.workload import build_model, build_trainer
from bissl_hf.cli.plan import Plan, PlannedPart, format_duration, format_plan, make_plan

from ..benchmark.test_benchmark import TINY


@pytest.fixture
def trainer(tmp_path):
    changes = {"num_alternations": 40, "head_warmup_epochs": 1, "eval_strategy": "steps", "eval_steps": 6}
    return build_trainer(TINY, build_model(TINY), torch.device("cpu"), output_dir=str(tmp_path), **changes)


def test_parts_come_as_often_as_in_the_run_and_two_alternations_are_trained(trainer):
    plan = make_plan(trainer, test_rows=80)
    assert trainer.state.global_step == 2 * 3
    times = {part.name: part.times for part in plan.parts}
    assert times == {
        "head warm-up step": 2048 // TINY.upper_batch, "lower step": 40, "upper step": 80, "log": 40,
        "evaluation": 40 * 3 // 6, "evaluation on the test split": 2,
    }  # fmt: skip
    assert all(part.seconds > 0 for part in plan.parts)
    assert {part.name: part.times for part in plan.within} == {
        "waiting for batches": 40, "moving batches and making views": 40 * 3,
    }  # fmt: skip
    each = {part.name: part.seconds for part in plan.parts}
    assert each["evaluation on the test split"] == pytest.approx(each["evaluation"] * 80 / TINY.evaluation_images)
    assert plan.peak_bytes > 2**20


def test_a_plan_adds_up():
    plan = Plan([PlannedPart("a", 2.0, 3), PlannedPart("b", 0.5, 4)], [PlannedPart("c", 1.0, 1)], 3 * 2**30)
    assert plan.seconds == 8
    text = format_plan(plan)
    assert "75.0 %" in text
    assert "about 8.0 s and 3.0 GiB" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4.25, "4.2 s"), (75, "1 min 15 s"), (3600 * 2 + 300, "2 h 05 min"), (86400 * 3 + 3600, "3 d 01 h")],
)
def test_durations_are_shown_in_their_two_largest_units(seconds, text):
    assert format_duration(seconds) == text
