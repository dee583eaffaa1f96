"""One optimizer and one schedule for two levels: each level moves in its own steps and follows its own schedule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .optimizers import build_optimizer
from .schedule import Schedule, level_schedule


@dataclass(frozen=True)
class LevelSettings:
    """How one level is optimized.

    Args:
        prefix (`str`): what the names of this level's arguments begin with, for messages: `"lower_"` or nothing.
        optim (`str`), optimizer_options (`dict`): the optimizer by name, and its further arguments.
        learning_rate (`float`), weight_decay (`float`)
        schedule (`str`), schedule_options (`dict`, *optional*): the schedule by name, and its arguments.
        num_steps (`int`): steps of this level in the whole run.
        warmup_steps (`int`): of them, those of the warm-up.
        max_grad_norm (`float`): bound on the gradient norm; 0 for none.
        head_learning_rate (`float`, *optional*): of the parameters outside of the backbone, if it is one of its own.
    """

    prefix: str
    optim: str
    optimizer_options: dict[str, Any]
    learning_rate: float
    weight_decay: float
    schedule: str
    schedule_options: dict[str, Any] | None
    num_steps: int
    warmup_steps: int
    max_grad_norm: float
    head_learning_rate: float | None = None

    def build_optimizer(self, backbone: Sequence[Tensor], heads: Sequence[Tensor] = ()) -> Optimizer:
        """Returns the optimizer of some parameters; weight decay applies to all of them.

        Args:
            backbone (`Sequence[torch.Tensor]`): of the first group of parameters.
            heads (`Sequence[torch.Tensor]`, *optional*): the others; in a group of their own if they have a learning
                rate of their own.
        """
        parameters: Sequence[Any] = (*backbone, *heads)
        if self.head_learning_rate is not None and heads:
            parameters = [{"params": list(backbone)}, {"params": list(heads), "lr": self.head_learning_rate}]
        return build_optimizer(
            self.optim,
            parameters,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            options=self.optimizer_options,
            field=f"{self.prefix}optim",
        )

    def build_schedule(self) -> Schedule:
        """Returns the factor on the learning rate as a function of this level's own step."""
        return level_schedule(
            self.schedule,
            num_steps=self.num_steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            options=self.schedule_options,
            field=f"{self.prefix}lr_scheduler_type",
        )

    def total_learning_rate(self) -> float:
        """Returns the sum of the learning rates of all steps."""
        return sum(self.learning_rates_by(self.num_steps))

    def learning_rates_by(self, steps: int) -> list[float]:
        """Returns the sums of the learning rates of each `steps` steps in a row."""
        factor = self.build_schedule()
        return [
            self.learning_rate * sum(factor(step) for step in range(start, start + steps))
            for start in range(0, self.num_steps, steps)
        ]


LEVELS = ("lower", "upper")


class TwoLevelOptimizer(Optimizer):
    """Chains the optimizers of both levels. A step moves those parameters only that have a gradient, and only the
    current level's have one: the other level's optimizer, its momentum included, stands still.

    `param_groups` holds the groups of the upper level, then those of the lower level, each tagged with its `"level"`.

    Args:
        upper (`torch.optim.Optimizer`), lower (`torch.optim.Optimizer`)
    """

    def __init__(self, upper: Optimizer, lower: Optimizer) -> None:
        self.upper, self.lower = upper, lower
        super().__init__([*upper.param_groups, *lower.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Makes a change to a group, of a schedule for example, reach the optimizer that owns it."""
        for level in LEVELS:
            for group in getattr(self, level).param_groups:
                group["level"] = level
        self.param_groups = [*self.upper.param_groups, *self.lower.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient.

        Raises:
            `ValueError`: if a closure is given: the two levels have no common loss.
        """
        if closure is not None:
            raise ValueError("closure is not supported: the two levels have no common loss.")
        for level in LEVELS:
            optimizer = getattr(self, level)
            if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
                optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both optimizers."""
        return {level: getattr(self, level).state_dict() for level in LEVELS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the states of both optimizers."""
        for level in LEVELS:
            getattr(self, level).load_state_dict(state_dict[level])
        # torch puts new dictionaries in the place of the groups when it loads a state.
        self._share_groups()


def own_step(global_step: int, level: str, *, lower_steps: int, upper_steps: int) -> int:
    """Returns how many steps of a level precede a global step: an alternation is its lower steps, then its
    upper."""
    alternation, place = divmod(global_step, lower_steps + upper_steps)
    if level == "lower":
        return alternation * lower_steps + min(place, lower_steps)
    return alternation * upper_steps + max(place - lower_steps, 0)


def two_level_scheduler(
    optimizer: Optimizer, schedules: dict[str, Schedule], *, lower_steps: int, upper_steps: int
) -> LambdaLR:
    """Returns a scheduler, stepped once per global step, that gives each group the factor of its own level's step."""

    def follow(level: str) -> Schedule:
        schedule = schedules[level]
        return lambda step: schedule(own_step(step, level, lower_steps=lower_steps, upper_steps=upper_steps))

    return LambdaLR(optimizer, [follow(group["level"]) for group in optimizer.param_groups])
