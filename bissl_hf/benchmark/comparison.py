"""Whole alternations of the trainer, of a bare loop and of the baseline, in turn in one process."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from transformers import TrainerCallback

from ..trainer.bissl_trainer import BiSSLTrainer
from .loops import PHASES, PlainLoop
from .measuring import SynchronisationCounter, seconds, wait_for

TRAINER = "trainer"
Times = dict[str, list[float]]


def timed_steps(
    loop: PlainLoop, device: torch.device, times: Times, unit: Callable[[], Any] | None = None
) -> Iterator[None]:
    """Takes one alternation of a loop step by step, and adds its seconds to `times` when it is over.

    Args:
        loop ([`PlainLoop`])
        device (`torch.device`): where it works.
        times (`dict[str, list[float]]`): gets the seconds of each phase and of each of its steps, those spent
            `"waiting"` for workers, and the mean of the `"unit"` where there is one.
        unit (`Callable`, *optional*): timed after each step, as a measure of how fast the machine is at the moment.
    """
    steps, waited = loop.steps(), loop.waited
    spent: Times = {phase: [] for phase in PHASES}
    units: list[float] = []
    phase = PHASES[0]
    while True:
        wait_for(device)
        start = time.perf_counter()
        done = next(steps, None)
        wait_for(device)
        taken = time.perf_counter() - start
        if done is None:
            break
        phase = done
        spent[phase].append(taken)
        if unit is not None:
            units.append(seconds(unit, device))
        yield
    spent[phase][-1] += taken  # clearing up is a part of the last one
    _enter(times, spent, waiting=loop.waited - waited)
    if units:
        times["unit"].append(sum(units) / len(units))


def steps_of(phase: str) -> str:
    """Name of the list that holds the seconds of the single steps of a phase."""
    return f"{phase} steps"


def _enter(times: Times, spent: Times, *, waiting: float) -> None:
    """Adds one alternation, with the seconds of each step by phase."""
    for phase, seconds_of_steps in spent.items():
        times[phase].append(sum(seconds_of_steps))
        times[steps_of(phase)] += seconds_of_steps
    times["waiting"].append(waiting)


class PhaseClock(TrainerCallback):
    """Times the phases of a trainer's alternations, and how long its steps wait for a batch. Other loops take their
    turns outside the trainer's time.

    Args:
        device (`torch.device`): where the trainer works.
        beside (`Mapping[str, PlainLoop]`, *optional*): loops that take a step after each of the trainer's, so that
            both meet the same machine.
        after (`Mapping[str, PlainLoop]`, *optional*): loops that take an alternation after each of the trainer's.
        units (`Mapping[str, Callable]`, *optional*): what to time after each step of a loop; see [`timed_steps`].

    Attributes:
        seconds (`dict[str, dict[str, list[float]]]`): by runner and phase, one entry per alternation, and also
            `"waiting"` (for batches); of the trainer `"log"`; of a loop that has a unit `"unit"`. [`steps_of`] names
            the lists with one entry per step.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        beside: Mapping[str, PlainLoop] | None = None,
        after: Mapping[str, PlainLoop] | None = None,
        units: Mapping[str, Callable[[], Any]] | None = None,
    ) -> None:
        self.device, self.beside, self.after, self.units = device, beside or {}, after or {}, units or {}
        self.seconds: dict[str, Times] = defaultdict(lambda: defaultdict(list))
        self._mark = self._step_end = self._waited = 0.0
        self._spent: Times = {}
        self._steps_beside: list[Iterator[None]] = []

    def _steps_of(self, name: str, loop: PlainLoop) -> Iterator[None]:
        return timed_steps(loop, self.device, self.seconds[name], self.units.get(name))

    def _lap(self) -> float:
        wait_for(self.device)
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        return spent

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._steps_beside = [self._steps_of(name, loop) for name, loop in self.beside.items()]
        self._spent, self._waited = {phase: [] for phase in PHASES}, 0.0
        self._lap()
        self._step_end = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._waited += time.perf_counter() - self._step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = args.lower_steps + args.upper_steps
        step = (state.global_step - 1) % steps
        self._spent[PHASES[step >= args.lower_steps]].append(self._lap())
        for others in self._steps_beside:
            next(others)
        if step == steps - 1:
            for others in self._steps_beside:
                next(others, None)
            _enter(self.seconds[TRAINER], self._spent, waiting=self._waited)
        self._lap()
        self._step_end = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in (logs or {}):
            return
        self.seconds[TRAINER]["log"].append(self._lap())
        for name, loop in self.after.items():
            for _ in self._steps_of(name, loop):
                pass


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
    *,
    beside: Mapping[str, PlainLoop],
    after: Mapping[str, PlainLoop],
    units: Mapping[str, Callable[[], Any]] | None = None,
    warmups: int = 1,
) -> dict[str, Times]:
    """Trains, while other loops take their turns.

    Args:
        trainer ([`BiSSLTrainer`]): it runs to its end.
        beside, after (`Mapping[str, PlainLoop]`), units (`Mapping[str, Callable]`, *optional*): see [`PhaseClock`];
            each loop has a model of its own.
        warmups (`int`, *optional*, defaults to 1): first alternations that do not count.

    Returns:
        `dict[str, dict[str, list[float]]]`: see [`PhaseClock`].
    """
    clock = PhaseClock(trainer.args.device, beside=beside, after=after, units=units)
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    total = int(trainer.args.num_alternations)
    return {
        name: {phase: times[len(times) * warmups // total :] for phase, times in phases.items()}
        for name, phases in clock.seconds.items()
    }
