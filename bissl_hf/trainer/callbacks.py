"""Callbacks of all trainers: the progress bar and its lines, the clocks, the best checkpoint, the end of an epoch."""

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from ..data.alternation import AlternatingDataLoader
from ..report.reading import LEGEND
from ..text import for_console

_SHOWN = {
    "loss": "loss",
    "lower/loss": "pretext",
    "upper/loss": "downstream",
    "solver/residual": "residual",
    "levels/pull": "pull",
    "eval_accuracy": "accuracy",
    "eval_map": "mAP",
    "eval_loss": "loss",
    "knn_accuracy": "kNN accuracy",
    "rankme": "RankMe",
}
# Steps of the present phase from which its pace is taken.
_PACE_STEPS = 50
# An evaluation of more batches shows a bar of its own.
_SHORT_EVALUATION = 20


def format_log(logs: Mapping[str, Any], args: TrainingArguments, num_epochs: float) -> str | None:
    """Returns the figures of a log that a person wants to watch as one line; `None` if there are none.

    Args:
        logs (`Mapping[str, Any]`)
        args (`TrainingArguments`): with `num_alternations` an epoch is called alternation.
        num_epochs (`float`): of the run.
    """
    shown = {name: title for name, title in _SHOWN.items() if name in logs}
    if "lower/loss" in logs:
        shown.pop("loss", None)  # the mean over steps of both levels, which says little
    if not shown:
        return None
    unit = "alternation" if hasattr(args, "num_alternations") else "epoch"
    figures = "  ".join(f"{title} {float(logs[name]):.4g}" for name, title in shown.items())
    place = "on validation: " if any(name.startswith("eval_") for name in shown) else ""
    return f"{unit} {logs.get('epoch', 0):.4g}/{num_epochs:g}  {place}{figures}"


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


class ShortPrinterCallback(PrinterCallback):
    """One short line per log, for runs without a bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how to read the lines."""
        if state.is_world_process_zero and hasattr(args, "num_alternations"):
            print(LEGEND, flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prints the figures that a person wants to watch."""
        line = format_log(logs or {}, args, state.num_train_epochs)
        if state.is_world_process_zero and line:
            print(line, flush=True)


class ShortProgressCallback(ProgressCallback):
    """Trainer's progress bar, with the time left by the pace of each level, and one short line per log in the place of
    all its figures (which trackers, the state and `all_results.json` still get).

    Args:
        clock ([`StepClock`]): of the same trainer.
    """

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock
        self._warnings: logging.Handler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how to read the lines, and opens the bar."""
        if not state.is_world_process_zero:
            return
        if hasattr(args, "num_alternations"):
            print(LEGEND, flush=True)
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
        self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=form)
        self.current_step = state.global_step
        if not logging.getLogger().handlers:  # else whoever has set up the logging knows where it goes
            self._warnings = _AboveBar()
            logging.getLogger(__name__.split(".")[0]).addHandler(self._warnings)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        if self.training_bar is not None:
            epochs = math.ceil(state.num_train_epochs - (state.epoch or 0) - 1e-9)
            left = self.clock.time_left(state.global_step, state.max_steps, epochs)
            shown = "time left after the first alternation" if left is None else f"{tqdm.format_interval(left)} left"
            self.training_bar.set_postfix_str(shown, refresh=False)
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Shows a bar for an evaluation that takes long."""
        if (
            not state.is_world_process_zero
            or not has_length(eval_dataloader)
            or len(eval_dataloader) <= _SHORT_EVALUATION
        ):
            return
        bar = self.prediction_bar
        if bar is None or bar.n >= (bar.total or 0):  # the second model of an evaluation starts again
            if bar is not None:
                bar.close()
            self.prediction_bar = bar = tqdm(
                total=len(eval_dataloader), desc="Evaluation", leave=False, dynamic_ncols=True
            )
        bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes the figures that a person wants to watch."""
        line = format_log(logs or {}, args, state.num_train_epochs)
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        if self._warnings is not None:
            logging.getLogger(__name__.split(".")[0]).removeHandler(self._warnings)
            self._warnings = None
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("", refresh=False)
            self.training_bar.refresh()
        super().on_train_end(args, state, control, **kwargs)


class _AboveBar(logging.Handler):
    """Writes messages above the bar, in whole words, where the last resort of `logging` would write into it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(for_console(record.getMessage()), file=sys.stderr)


class Seconds(NamedTuple):
    """Seconds on the wall, and of CPU time of this process."""

    wall: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())


class TrainingClock(TrainerCallback):
    """Counts the seconds of training: those on the wall, and the CPU time of this process. A run that is resumed sets
    `seconds` to what lies behind it."""

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


class BestCheckpoint(TrainerCallback):
    """Knows which checkpoint is the best so far, by name.

    Trainer keeps its path, which is another one once the folder has been moved or fetched from the Hub, and which must
    not be published.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._found: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the name."""
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the name."""
        self.name = state["name"]

    def find_beside(self, checkpoint: Path) -> None:
        """Notes where the best checkpoint is, before a run goes on from a checkpoint beside it."""
        found = checkpoint.with_name(self.name) if self.name is not None else None
        self._found = found if found is not None and found.is_dir() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._found is not None:
            state.best_model_checkpoint, self._found = str(self._found), None


class EpochBoundary(TrainerCallback):
    """Keeps a checkpoint of an epoch's last step until the log and the evaluation of that epoch are done, so that a
    resume from it misses neither; and ends the workers of the loader after training."""

    def __init__(self) -> None:
        self._waiting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if control.should_save and ends_epoch:
            control.should_save, self._waiting = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._waiting:
            control.should_save, self._waiting = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if isinstance(train_dataloader, AlternatingDataLoader):
            train_dataloader.close()
