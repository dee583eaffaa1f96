import math

import pytest
import torch
from transformers import get_scheduler

from bissl_hf.optim.schedule import level_schedule
from bissl_hf.optim.two_level import TwoLevelOptimizer, own_step, two_level_scheduler


@pytest.mark.parametrize("warmup", [1, 4])
def test_the_warm_up_starts_with_the_first_step(warmup):
    schedule = level_schedule("cosine", num_steps=20, warmup_steps=warmup, field="x")
    assert [schedule(step) for step in range(warmup)] == [(step + 1) / warmup for step in range(warmup)]
    assert schedule(0) > 0


@pytest.mark.parametrize(
    ("name", "options"),
    [("linear", None), ("cosine", None), ("cosine_with_min_lr", {"min_lr_rate": 0.001}), ("constant", None),
     ("polynomial", {"power": 2.0}), ("inverse_sqrt", None)],
)  # fmt: skip
def test_what_follows_is_the_schedule_of_transformers(name, options):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    reference = get_scheduler(
        name, optimizer, num_warmup_steps=0, num_training_steps=15, scheduler_specific_kwargs=options
    )
    schedule = level_schedule(name, num_steps=20, warmup_steps=5, options=options, field="x")
    for step in range(15):
        assert schedule(5 + step) == pytest.approx(reference.lr_lambdas[0](step))


def test_the_papers_cosine_ends_at_a_thousandth():
    schedule = level_schedule("cosine_with_min_lr", num_steps=10, options={"min_lr_rate": 0.001}, field="x")
    assert schedule(10) == pytest.approx(0.001)
    assert schedule(5) == pytest.approx(0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_own_step_counts_the_steps_of_each_level():
    counts, order = {"lower": 0, "upper": 0}, (["lower"] * 3 + ["upper"] * 2) * 4
    for global_step, level in enumerate(order):
        for name, count in counts.items():
            assert own_step(global_step, name, lower_steps=3, upper_steps=2) == count
        counts[level] += 1


def test_each_group_follows_its_own_level():
    optimizer = TwoLevelOptimizer(
        upper=torch.optim.SGD([torch.zeros(1)], lr=2.0), lower=torch.optim.SGD([torch.zeros(1)], lr=3.0)
    )
    schedules = {"lower": lambda step: 1 / (1 + step), "upper": lambda step: 10.0**-step}
    scheduler = two_level_scheduler(optimizer, schedules, lower_steps=3, upper_steps=2)
    order = (["lower"] * 3 + ["upper"] * 2) * 2
    taken = {"lower": 0, "upper": 0}
    for level in order:
        rates = {group["level"]: group["lr"] for group in optimizer.param_groups}
        assert rates[level] == pytest.approx({"lower": 3.0, "upper": 2.0}[level] * schedules[level](taken[level]))
        taken[level] += 1
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cos"}, "lr is 'cos'; it must be one of"),
        ({"name": "reduce_lr_on_plateau"}, "follows a metric"),
        ({"name": "cosine", "warmup_steps": 11}, "warm-up for lr has 11 steps"),
        ({"name": "cosine", "options": {"nonsense": 1}}, "with the options {'nonsense': 1}"),
    ],
)
def test_bad_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        level_schedule(num_steps=10, field="lr", **arguments)


def test_absolute_options_are_taken_relative_to_the_learning_rate():
    schedule = level_schedule(
        "cosine_with_min_lr", num_steps=10, learning_rate=0.5, options={"min_lr": 0.1}, field="x"
    )
    assert schedule(0) * 0.5 == pytest.approx(0.5)
    assert schedule(10) * 0.5 == pytest.approx(0.1)
