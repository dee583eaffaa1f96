"""Callbacks of all trainers: the progress bar, the clock, the best checkpoint and the end of an epoch."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from transformers import ProgressCallback, TrainerCallback

from ..data.alternation import AlternatingDataLoader

_SHOWN = {
    "loss": "loss",
    "lower/loss": "lower loss",
    "upper/loss": "upper loss",
    "solver/residual": "residual",
    "levels/pull": "pull",
    "eval_loss": "eval loss",
    "eval_accuracy": "eval accuracy",
    "knn_accuracy": "kNN accuracy",
}


class ShortProgressCallback(ProgressCallback):
    """Trainer's progress bar, with one short line per log in the place of all its figures (which trackers, the state
    and `all_results.json` still get)."""

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Starts the bar again for the second model of an evaluation."""
        bar = self.prediction_bar
        if bar is not None and bar.total is not None and bar.n >= bar.total:
            bar.reset()
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Writes the figures that a person wants to watch."""
        if not state.is_world_process_zero or self.training_bar is None or not logs:
            return
        shown = {title: logs[name] for name, title in _SHOWN.items() if name in logs}
        if "lower/loss" in logs:
            shown.pop("loss", None)  # the mean over steps of both levels, which says little
        if shown:
            figures = "  ".join(f"{title} {float(value):.4g}" for title, value in shown.items())
            self.training_bar.write(f"epoch {logs.get('epoch', 0):.4g}/{state.num_train_epochs}  {figures}")


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
    """Keeps a checkpoint of the last step of an epoch, or of the run, until the log and the evaluation of that epoch
    are done, so that a resume from it misses neither; and ends the workers of the loader after training."""

    def __init__(self) -> None:
        self._waiting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if control.should_save and ends_epoch:
            control.should_save, self._waiting = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole = state.epoch is None or float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if not whole:
            # Asked to stop inside an epoch: its figures are kept in the checkpoint, and logged when it is complete.
            control.should_log = control.should_evaluate = False
        if self._waiting:
            control.should_save, self._waiting = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if isinstance(train_dataloader, AlternatingDataLoader):
            train_dataloader.close()
