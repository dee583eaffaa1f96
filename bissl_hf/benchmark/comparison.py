"""Whole alternations of the trainer, of a bare loop and of the baseline, in turn in one process."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from ..trainer.bissl_trainer import BiSSLTrainer
from .loops import PlainLoop
from .measuring import SynchronisationCounter, seconds, wait_for

TRAINER = "trainer"
PHASES = ("lower", "upper")


class PhaseClock(TrainerCallback):
    """Times the phases of a trainer's alternations, and how long its steps wait for a batch. After each alternation
    other loops take one too, outside the trainer's time.

    Args:
        device (`torch.device`): where the trainer works.
        loops (`Mapping[str, PlainLoop]`, *optional*): run after each alternation.
        unit (`Callable`, *optional*): timed after each of their steps, outside their time, as a measure of how fast
            the machine is at the moment.

    Attributes:
        seconds (`dict[str, dict[str, list[float]]]`): by runner and phase, one entry per alternation; of the trainer
            also `"waiting"` (for batches) and `"log"`; of another loop also `"unit"`.
    """

    def __init__(
        self,
        device: torch.device,
        loops: Mapping[str, PlainLoop] | None = None,
        unit: Callable[[], Any] | None = None,
    ) -> None:
        self.device, self.loops, self.unit = device, loops or {}, unit
        self.seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._mark = self._step_end = 0.0
        self._waited = 0.0

    def _lap(self) -> float:
        wait_for(self.device)
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        return spent

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap()
        self._step_end, self._waited = time.perf_counter(), 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._waited += time.perf_counter() - self._step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        place = state.global_step % (args.lower_steps + args.upper_steps)
        times = self.seconds[TRAINER]
        if place == args.lower_steps:
            times["lower"].append(self._lap())
        elif place == 0:
            times["upper"].append(self._lap())
            times["waiting"].append(self._waited)
        self._step_end = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        self.seconds[TRAINER]["log"].append(self._lap())
        for name, loop in self.loops.items():
            loop.model.train()
            units: list[float] = []
            if self.unit is not None:
                loop.between_steps = partial(self._time_unit, units)
            for phase in PHASES:
                before = sum(units)
                spent = seconds(getattr(loop, f"{phase}_phase"), self.device)
                self.seconds[name][phase].append(spent - (sum(units) - before))
            if units:
                self.seconds[name]["unit"].append(sum(units) / len(units))
            loop.alternations += 1

    def _time_unit(self, units: list[float]) -> None:
        if self.unit is not None:
            units.append(seconds(self.unit, self.device))


class SynchronisationWatch(TrainerCallback):
    """Counts the waits for the device inside the steps of a trainer, by phase; on a CPU those that there would be."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.count = dict.fromkeys(PHASES, 0)
        self._counter: SynchronisationCounter | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counter = SynchronisationCounter(self.device)
        self._counter.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            place = state.global_step % (args.lower_steps + args.upper_steps)
            self.count[PHASES[place >= args.lower_steps]] += self._counter.count
            self._counter = None


def compare_alternations(
    trainer: BiSSLTrainer,
    loops: Mapping[str, PlainLoop],
    *,
    unit: Callable[[], Any] | None = None,
    warmups: int = 1,
) -> dict[str, dict[str, list[float]]]:
    """Trains, and takes an alternation with each loop after each of the trainer's.

    Args:
        trainer ([`BiSSLTrainer`]): it runs to its end.
        loops (`Mapping[str, PlainLoop]`): on models of their own.
        unit (`Callable`, *optional*): see [`PhaseClock`].
        warmups (`int`, *optional*, defaults to 1): first alternations that do not count.

    Returns:
        `dict[str, dict[str, list[float]]]`: see [`PhaseClock`].
    """
    clock = PhaseClock(trainer.args.device, loops, unit)
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return {
        name: {phase: times[warmups:] for phase, times in phases.items()} for name, phases in clock.seconds.items()
    }
