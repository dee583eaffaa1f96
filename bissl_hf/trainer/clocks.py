"""Clocks of all trainers: what training takes, and what its steps take by phase."""

import time
from collections import deque
from statistics import fmean
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainingArguments

# Steps of the present phase from which its pace is taken.
_PACE_STEPS = 50


class StepClock(TrainerCallback):
    """Measures what steps take, lower and upper ones apart, and what is between epochs (log, evaluation, checkpoint).

    On a GPU a step is queued and may be waited for in the next one; the sum over an epoch is right.

    Args:
        args (`TrainingArguments`): with `lower_steps` and `upper_steps` an epoch has two phases.

    Attributes:
        seconds (`dict[str, float]`): by phase: `lower` and `upper`, or `step`; and `between`.
    """

    def __init__(self, args: TrainingArguments) -> None:
        steps = {"lower": getattr(args, "lower_steps", 0), "upper": getattr(args, "upper_steps", 0)}
        self.phases = steps if hasattr(args, "num_alternations") else {"step": 1}
        self.seconds = dict.fromkeys((*self.phases, "between"), 0.0)
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=_PACE_STEPS) for name in self.seconds}
        self._since: float | None = None

    def phase_of(self, step: int) -> str:
        """Returns the phase of the step with this number, from 0."""
        place = step % sum(self.phases.values())
        return next(iter(self.phases)) if place < next(iter(self.phases.values())) else list(self.phases)[-1]

    def add(self, name: str, seconds: float) -> None:
        """Notes one step of a phase, or one time `between`."""
        self.seconds[name] += seconds
        self._recent[name].append(seconds)

    def time_left(self, done: int, total: int, epochs: int) -> float | None:
        """Returns the seconds that the steps that are left will take, with the times between the epochs that are
        left; `None` while a phase of which steps are left has not been measured.

        Args:
            done, total (`int`): steps.
            epochs (`int`): how many are not ended.
        """
        whole, rest = divmod(total - done, sum(self.phases.values()))
        left = {name: whole * steps for name, steps in self.phases.items()}
        for step in range(done, done + rest):
            left[self.phase_of(step)] += 1
        if any(count and not self._recent[name] for name, count in left.items()):
            return None
        between = self._recent["between"]
        found = sum(count * fmean(self._recent[name]) for name, count in left.items() if count)
        return found + (epochs * fmean(between) if between else 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.seconds = dict.fromkeys(self.seconds, 0.0)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.add("between", now - self._since)
        self._since = now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.add(self.phase_of(state.global_step - 1), now - self._since)
        self._since = now

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._since is not None:
            self.add("between", time.perf_counter() - self._since)
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return dict(self.seconds)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the seconds of an interrupted run."""
        self.seconds = dict(state)


class Seconds(NamedTuple):
    """Seconds on the wall, and of CPU time of this process."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())


class TrainingClock(TrainerCallback):
    """Counts the seconds of training: those on the wall, and the CPU time of this process. A run that is resumed sets
    `seconds` to what has passed."""

    def __init__(self) -> None:
        self.seconds = Seconds(0.0, 0.0)
        self._since: Seconds | None = None

    def read(self) -> Seconds:
        """Returns the seconds so far."""
        if self._since is None:
            return self.seconds
        now = Seconds.now()
        return Seconds(*(s + n - b for s, n, b in zip(self.seconds, now, self._since, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """Returns the seconds so far."""
        return self.read()._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from the seconds of an interrupted run."""
        self.seconds = Seconds(**state)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.seconds = Seconds(0.0, 0.0)
        self._since = Seconds.now()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds, self._since = self.read(), None
