"""What a run will take: two alternations are measured, and the rest follows from how often each part comes."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..benchmark.comparison import TRAINER, PhaseClock
from ..benchmark.measuring import wait_for, watched_memory
from ..data.alternation import Stream
from ..text import format_table
from ..trainer.bissl_trainer import BiSSLTrainer
from ..trainer.pretext_trainer import PretextTrainer

MEASURED_ALTERNATIONS = 2
_MEASURED_STEPS = 5


@dataclass(frozen=True)
class PlannedPart:
    """A part of a run.

    Args:
        name (`str`)
        seconds (`float`): of one.
        times (`float`): how many there are.
    """

    name: str
    seconds: float
    times: float

    @property
    def total(self) -> float:
        """Seconds of all together."""
        return self.seconds * self.times if self.times else 0.0


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Args:
        parts (`list[PlannedPart]`): they add up to the run.
        within (`list[PlannedPart]`): what some of them contain.
        peak_bytes (`int`): largest memory in use: of the GPU, or on a CPU of the whole process.
    """

    parts: list[PlannedPart]
    within: list[PlannedPart]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(part.total for part in self.parts)


def make_plan(trainer: BiSSLTrainer, pretrainer: PretextTrainer | None = None, *, test_rows: int = 0) -> Plan:
    """Trains for a moment and estimates the whole run from it. Both trainers move their models and write into their
    output folders: give them a temporary one, and do not train with them afterwards.

    Args:
        trainer ([`BiSSLTrainer`]): with the data and the arguments of the run.
        pretrainer ([`PretextTrainer`], *optional*): of the stage before it.
        test_rows (`int`, *optional*, defaults to 0): images of a test split that is evaluated before and after.
    """
    args, device = trainer.args, trainer.args.device
    for quiet in filter(None, (trainer, pretrainer)):
        quiet.remove_callback(PrinterCallback)
    parts = []
    with watched_memory(device) as memory:
        if pretrainer is not None and pretrainer.args.max_steps > 0:
            parts.append(PlannedPart("pre-training step", *_pretraining(pretrainer)))
        parts += _head_warmup(trainer)
        views = _TimedCalls(trainer.streams.prepare, device)
        trainer.streams.prepare = views  # type: ignore[method-assign]
        clock = PhaseClock(device)
        stages = _StageClock(device)
        for callback in (stages, clock, _Stop(MEASURED_ALTERNATIONS * (args.lower_steps + args.upper_steps))):
            trainer.add_callback(callback)
        trainer.train()
    phases = {name: times[-1] for name, times in clock.seconds[TRAINER].items()}
    total = args.num_alternations
    evaluation = _last(stages.seconds["evaluation"])
    parts += [
        PlannedPart("lower step", phases["lower"] / args.lower_steps, total * args.lower_steps),
        PlannedPart("upper step", phases["upper"] / args.upper_steps, total * args.upper_steps),
        PlannedPart("log", phases.get("log", 0.0), _times(args, args.logging_strategy, args.logging_steps)),
        PlannedPart("evaluation", evaluation, _times(args, args.eval_strategy, args.eval_steps)),
        PlannedPart("checkpoint", _last(stages.seconds["saving"]), _times(args, args.save_strategy, args.save_steps)),
    ]
    if test_rows and evaluation:
        per_image = evaluation / len(trainer.eval_dataset)  # type: ignore[arg-type]
        parts.append(PlannedPart("evaluation on the test split", per_image * test_rows, 2))
    within = [
        PlannedPart("waiting for batches", phases["waiting"], total),
        PlannedPart(
            "moving batches and making views", views.per_call(), total * (args.lower_steps + args.upper_steps)
        ),
    ]
    return Plan([part for part in parts if part.times], within, memory.peak)


def _pretraining(pretrainer: PretextTrainer) -> tuple[float, int]:
    steps = pretrainer.args.max_steps
    return _seconds_per_step(pretrainer, min(steps, _MEASURED_STEPS)), steps


def _head_warmup(trainer: BiSSLTrainer) -> list[PlannedPart]:
    source = trainer.streams.sources[Stream.HEAD_WARMUP]
    steps = trainer.args.head_warmup_epochs * source.steps_per_alternation
    measured = min(steps, _MEASURED_STEPS)
    if not measured:
        return []
    start = time.perf_counter()
    trainer.warm_up_head(max_steps=measured)
    wait_for(trainer.args.device)
    return [PlannedPart("head warm-up step", (time.perf_counter() - start) / measured, steps)]


def _seconds_per_step(trainer: Trainer, steps: int) -> float:
    """Trains for a few steps and times them, without the first where there are others."""
    clock = _StepClock(trainer.args.device)
    trainer.add_callback(clock)
    trainer.add_callback(_Stop(steps))
    trainer.train()
    spent = clock.seconds[1:] or clock.seconds
    return sum(spent) / len(spent)


def _last(values: list[float]) -> float:
    return values[-1] if values else 0.0


def _times(args: Any, strategy: Any, steps: float | None) -> float:
    """How often something comes in a run."""
    if strategy == IntervalStrategy.NO:
        return 0
    if strategy != IntervalStrategy.STEPS or not steps:
        return args.num_alternations
    total = args.num_alternations * (args.lower_steps + args.upper_steps)
    return math.floor(total / (steps if steps >= 1 else math.ceil(total * steps)))


class _TimedCalls:
    """Calls a function and adds up its time."""

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self._function, self._device = function, device
        self._seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wait_for(self._device)
        start = time.perf_counter()
        result = self._function(*args, **kwargs)
        wait_for(self._device)
        self._seconds.append(time.perf_counter() - start)
        return result

    def per_call(self) -> float:
        """Mean seconds of the second half of the calls; the first ones also set up."""
        late = self._seconds[len(self._seconds) // 2 :]
        return sum(late) / max(len(late), 1)


class _Stop(TrainerCallback):
    """Ends a training after a number of steps, with what the end of an epoch brings."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self._steps:
            control.should_training_stop = True


class _StepClock(TrainerCallback):
    """Seconds of each step, reading included."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._mark = device, time.perf_counter()
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wait_for(self._device)
        now = time.perf_counter()
        self.seconds.append(now - self._mark)
        self._mark = now


class _StageClock(TrainerCallback):
    """Seconds of the evaluations and checkpoints of a training."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._mark = device, time.perf_counter()
        self.seconds: dict[str, list[float]] = {"evaluation": [], "saving": []}

    def _lap(self) -> float:
        wait_for(self._device)
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        return spent

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):  # an evaluation logs too, within itself
            self._lap()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds["evaluation"].append(self._lap())

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds["saving"].append(self._lap())


def format_plan(plan: Plan) -> str:
    """Lays a plan out as a table with the whole run below."""
    rows = [_row(part, plan.seconds) for part in plan.parts]
    within = [_row(part, plan.seconds) for part in plan.within]
    return "\n".join(
        [
            format_table(rows),
            "",
            "Within the steps of both levels",
            "",
            format_table(within),
            "",
            f"The whole run will take about {format_duration(plan.seconds)} and {plan.peak_bytes / 2**30:.1f} GiB of "
            "memory on this machine.",
        ]
    )


def _row(part: PlannedPart, total: float) -> dict[str, str]:
    return {
        "part": part.name,
        "each": f"{part.seconds:.3f} s",
        "times": f"{part.times:,.0f}",
        "together": format_duration(part.total),
        "share": f"{100 * part.total / total:.1f} %" if total else "",
    }


def format_duration(seconds: float) -> str:
    """Returns a duration in its two largest units: `"2 h 05 min"`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours:02d} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
