"""What a run will take: two alternations are measured, and the rest follows from how often each part comes."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

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
        return self.seconds * self.times


class Stopwatch(TrainerCallback):
    """Times the steps, evaluations and checkpoints of a training, and ends it early.

    Args:
        device (`torch.device`): where it works.
        max_steps (`int`): steps after which training ends.

    Attributes:
        seconds (`dict[str, list[float]]`): of each `"lower step"` and `"upper step"` (of a trainer with one level,
            `"step"`), `"evaluation"` and `"checkpoint"`; a step includes the wait for its batch.
    """

    def __init__(self, device: torch.device, max_steps: int) -> None:
        self._device, self._max_steps, self._mark = device, max_steps, time.perf_counter()
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def last(self, name: str) -> float:
        """Mean seconds of the later half of what was measured, for the first of a kind also set up; 0 without any."""
        found = self.seconds[name][len(self.seconds[name]) // 2 :]
        return sum(found) / max(len(found), 1)

    def _lap(self, name: str | None = None) -> None:
        wait_for(self._device)
        now = time.perf_counter()
        if name:
            self.seconds[name].append(now - self._mark)
        self._mark = now

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lower, upper = getattr(args, "lower_steps", 0), getattr(args, "upper_steps", 0)
        level = "" if not upper else "lower " if (state.global_step - 1) % (lower + upper) < lower else "upper "
        self._lap(f"{level}step")
        control.should_training_stop |= state.global_step >= self._max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in (logs or {}):  # an evaluation logs too, within itself
            self._lap()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap("evaluation")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lap("checkpoint")


def make_plan(
    trainer: BiSSLTrainer, pretrainer: PretextTrainer | None = None, *, test_rows: int = 0
) -> tuple[list[PlannedPart], int]:
    """Trains for a moment and estimates the whole run from it. Both trainers move their models and write into their
    output folders: give them a temporary one, and do not train with them afterwards.

    Args:
        trainer ([`BiSSLTrainer`]): with the data and the arguments of the run.
        pretrainer ([`PretextTrainer`], *optional*): of the stage before it.
        test_rows (`int`, *optional*, defaults to 0): images of a test split that is evaluated before and after.

    Returns:
        `tuple[list[PlannedPart], int]`: the parts, which add up to the run, and the largest memory in use in bytes: of
        the GPU, or on a CPU of the whole process.
    """
    args, parts = trainer.args, []
    steps = args.lower_steps + args.upper_steps
    with watched_memory(args.device) as memory:
        if pretrainer is not None and pretrainer.args.max_steps > 0:
            total = pretrainer.args.max_steps
            parts.append(PlannedPart("pre-training step", _timed(pretrainer, _MEASURED_STEPS).last("step"), total))
        parts += _head_warmup(trainer)
        watch = _timed(trainer, MEASURED_ALTERNATIONS * steps)
    times = {
        "lower step": args.num_alternations * args.lower_steps,
        "upper step": args.num_alternations * args.upper_steps,
        "evaluation": _times(args, args.eval_strategy, args.eval_steps),
        "checkpoint": _times(args, args.save_strategy, args.save_steps),
    }
    parts += [PlannedPart(name, watch.last(name), count) for name, count in times.items()]
    if test_rows and watch.seconds["evaluation"]:
        per_image = watch.last("evaluation") / len(trainer.eval_dataset)  # type: ignore[arg-type]
        parts.append(PlannedPart("evaluation on the test split", per_image * test_rows, 2))
    return [part for part in parts if part.times], memory.peak


def _timed(trainer: Trainer, max_steps: int) -> Stopwatch:
    watch = Stopwatch(trainer.args.device, max_steps)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    return watch


def _head_warmup(trainer: BiSSLTrainer) -> list[PlannedPart]:
    steps = trainer.args.head_warmup_epochs * trainer.streams.sources[Stream.HEAD_WARMUP].steps_per_alternation
    measured = min(steps, _MEASURED_STEPS)
    if not measured:
        return []
    start = time.perf_counter()
    trainer.warm_up_head(max_steps=measured)
    wait_for(trainer.args.device)
    return [PlannedPart("head warm-up step", (time.perf_counter() - start) / measured, steps)]


def _times(args: Any, strategy: Any, steps: float | None) -> float:
    """How often something comes in a run."""
    if strategy == IntervalStrategy.NO:
        return 0
    if strategy != IntervalStrategy.STEPS or not steps:
        return args.num_alternations
    total = args.num_alternations * (args.lower_steps + args.upper_steps)
    return math.floor(total / (steps if steps >= 1 else math.ceil(total * steps)))


def format_plan(parts: list[PlannedPart], peak_bytes: int) -> str:
    """Lays a plan out as a table with the whole run below."""
    total = sum(part.total for part in parts)
    rows = [
        {
            "part": part.name,
            "each": f"{part.seconds:.3f} s",
            "times": f"{part.times:,.0f}",
            "together": format_duration(part.total),
            "share": f"{100 * part.total / total:.1f} %",
        }
        for part in parts
    ]
    whole = f"about {format_duration(total)} and {peak_bytes / 2**30:.1f} GiB of memory on this machine."
    return f"{format_table(rows)}\n\nThe whole run will take {whole}"


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
