"""What a person sees while a trainer works: one short line per log, and a bar with the time that is left."""

import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..report.reading import LEGEND
from ..text import for_console
from .clocks import StepClock

_SHOWN = {
    "loss": "loss",
    "lower/loss": "pretext",
    "upper/loss": "downstream",
    "solver/residual": "residual",
    "levels/pull": "pull",
    "eval_accuracy": "accuracy",
    "eval_map": "mAP",
    "eval_r2": "R2",
    "eval_loss": "loss",
    "knn_accuracy": "kNN accuracy",
    "rankme": "RankMe",
}
PACKAGE = __name__.split(".")[0]
# An evaluation of more batches shows a bar of its own.
_SHORT_EVALUATION = 20


def format_log(logs: Mapping[str, Any], args: TrainingArguments, state: TrainerState) -> str | None:
    """Returns the figures of a log that a person wants to watch as one line; `None` if there are none.

    Args:
        logs (`Mapping[str, Any]`)
        args (`TrainingArguments`): with `num_alternations` an epoch is called alternation; with `max_steps` steps are
            counted.
        state (`TrainerState`)
    """
    shown = {name: title for name, title in _SHOWN.items() if name in logs}
    if "lower/loss" in logs:
        shown.pop("loss", None)  # the mean over steps of both levels, which says little
    if not shown:
        return None
    place = f"epoch {logs.get('epoch', 0):.4g}/{state.num_train_epochs:g}"
    if hasattr(args, "num_alternations"):
        place = place.replace("epoch", "alternation")
    elif args.max_steps > 0:
        place = f"step {state.global_step}/{state.max_steps}"
    figures = "  ".join(f"{title} {float(logs[name]):.4g}" for name, title in shown.items())
    split = "on validation: " if any(name.startswith("eval_") for name in shown) else ""
    return f"{place}  {split}{figures}"


class ShortPrinterCallback(PrinterCallback):
    """One short line per log while a model is trained, for runs without a bar; an evaluation after that is no part of
    its progress."""

    def __init__(self) -> None:
        super().__init__()
        self.is_training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how to read the lines."""
        self.is_training = True
        if state.is_world_process_zero and hasattr(args, "num_alternations"):
            print(LEGEND, flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Prints the figures that a person wants to watch."""
        line = format_log(logs or {}, args, state)
        if state.is_world_process_zero and self.is_training and line:
            print(line, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prints no more lines."""
        self.is_training = False


class ShortProgressCallback(ProgressCallback):
    """Trainer's progress bar, with the time left by the pace of each level, and one short line per log in the place of
    all its figures (which trackers, the state and `all_results.json` still get).

    Args:
        clock ([`StepClock`]): of the same trainer.
    """

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock
        self._messages: logging.Handler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says how to read the lines, and opens the bar."""
        if not state.is_world_process_zero:
            return
        if hasattr(args, "num_alternations"):
            print(LEGEND, flush=True)
        form = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}{postfix}]"
        self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, bar_format=form)
        self.current_step = state.global_step
        self._messages = show_messages()

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
        line = format_log(logs or {}, args, state)
        if line and state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        if self._messages is not None:
            logging.getLogger(PACKAGE).removeHandler(self._messages)
            self._messages = None
        if self.training_bar is not None:
            self.training_bar.set_postfix_str("", refresh=False)
            self.training_bar.refresh()
        super().on_train_end(args, state, control, **kwargs)


def show_messages() -> logging.Handler | None:
    """Has the warnings of this package written above a bar, if there is one, and in whole words, where the last resort
    of `logging` would write into it.

    Returns:
        `logging.Handler | None`: what was added; none where the logging is set up already.
    """
    logger = logging.getLogger(PACKAGE)
    if logger.handlers or logging.getLogger().handlers:
        return None
    handler = _AboveBar(logging.WARNING)
    logger.addHandler(handler)
    return handler


class _AboveBar(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(for_console(record.getMessage()), file=sys.stderr)
