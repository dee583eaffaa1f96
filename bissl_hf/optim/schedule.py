"""Learning-rate schedules by name, as functions of a level's own step."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import SchedulerType, get_scheduler

Schedule = Callable[[int], float]

# They react to a metric instead of following the steps.
_METRIC_DRIVEN = (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY)


def level_schedule(
    name: str,
    *,
    num_steps: int,
    learning_rate: float = 1.0,
    warmup_steps: int = 0,
    options: Any = None,
    field: str,
) -> Schedule:
    """Returns the factor on the learning rate as a function of a level's own step, counted from 0.

    The warm-up is linear and starts with the first step: step s of w has the factor (s + 1) / w. What follows is the
    schedule of transformers of that name over the remaining steps.

    Args:
        name (`str`): a schedule of `transformers.get_scheduler`.
        num_steps (`int`): steps of this level in the whole run.
        learning_rate (`float`, *optional*, defaults to 1.0): what the factor applies to; some options of schedules,
            such as `min_lr`, are absolute.
        warmup_steps (`int`, *optional*, defaults to 0): steps of warm-up among them.
        options (`dict`, *optional*): further arguments of the schedule.
        field (`str`): the argument that names the schedule, for messages.

    Raises:
        `ValueError`: for an unknown schedule, one that follows a metric, or options that it does not take.
    """
    try:
        kind = SchedulerType(name)
    except ValueError as error:
        allowed = ", ".join(kind.value for kind in SchedulerType if kind not in _METRIC_DRIVEN)
        raise ValueError(f"{field} is {name!r}; it must be one of {allowed}.") from error
    if kind in _METRIC_DRIVEN:
        raise ValueError(f"{field} is {kind.value!r}, which follows a metric; the levels need a schedule over steps.")
    if not 0 <= warmup_steps <= num_steps:
        raise ValueError(f"The warm-up for {field} has {warmup_steps} steps; it must fit into the {num_steps} steps.")
    unused = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
    try:
        scheduler = get_scheduler(
            kind,
            unused,
            num_warmup_steps=0,
            num_training_steps=max(num_steps - warmup_steps, 1),
            scheduler_specific_kwargs=options,
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} is {kind.value!r} with the options {options}: {error}") from error
    decay: Schedule = scheduler.lr_lambdas[0]

    def factor(step: int) -> float:
        return (step + 1) / warmup_steps if step < warmup_steps else decay(step - warmup_steps)

    return factor
