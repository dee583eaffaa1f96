"""Signals that ask a run to end: the step is finished, a checkpoint saved, and the process ends with 128 + number."""

import ctypes
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback

from ..distributed import world_size

# What a shell, a terminal and schedulers send: SLURM sends SIGUSR1 where it is asked to warn before the time limit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# How often a process looks whether its launcher is still there, and how long it has to end without it.
_WATCH_SECONDS, _GRACE_SECONDS = 0.1, 30.0
# A launcher passes on what the terminal has sent to its processes already.
_SAME_SIGNAL_SECONDS = 0.5
_SIGNAL_OF_PARENTS_END = 1  # PR_SET_PDEATHSIG of linux/prctl.h
# Read on import: transformers sets variables of this kind itself. The first is torchrun's, the second accelerate's.
_HAS_LAUNCHER = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_USE_CPU" in os.environ


class StopSignals(TrainerCallback):
    """Ends training politely at the first signal of [`STOP_SIGNALS`], on all processes at the same step. A second
    signal ends the process at once. Signals are handled while a run trains and are then left to whatever handled them
    before; only the main thread can handle any.

    Attributes:
        stopped_by (`int`, *optional*): number of the signal that has ended the training.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self._received = 0
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None
        self._exchange: tuple[torch.Tensor, Any] | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not _trains(frame):
            # An error has ended the training before its end could be noticed.
            self._leave_signals()
            signal.raise_signal(number)
        elif not self._received:
            self._received, self._received_at = number, time.monotonic()
        elif not _HAS_LAUNCHER or time.monotonic() - self._received_at > _SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _leave_signals(self) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _agreed(self) -> int:
        """Returns the signal that any process had received a step ago, or 0. The exchange is between hosts and goes on
        during the next step: nothing waits for the device, nor for a process that is less than a step behind."""
        if world_size() == 1:
            return self._received
        # Before the first exchange a process knows of its own signals only, which must not end it alone.
        agreed = self._exchanged() if self._exchange else 0
        number = torch.tensor(self._received)
        work = dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = (number, work)
        return agreed

    def _exchanged(self) -> int:
        """Returns what the last exchange has found."""
        if self._exchange is None:
            return self._received
        (number, work), self._exchange = self._exchange, None
        work.wait()
        return int(number)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stopped_by, self._received, self._exchange = None, 0, None
        if world_size() > 1 and self._group is None and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        if threading.current_thread() is threading.main_thread():
            self._leave_signals()
            self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
            end_with_launcher()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if number := self._agreed():
            self.stopped_by = number
            control.should_training_stop = True
            control.should_save = not state.is_hyper_param_search  # a trial starts anew

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopped_by:
            # Trainer would load the best checkpoint now, and with a limit of one remove the newest.
            state.best_model_checkpoint = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._leave_signals()
        self._agreed()
        received = self._exchanged()
        if received and not self.stopped_by:
            os.kill(os.getpid(), received)  # it came after the last step, and everything of the run is saved

    def exit_if_stopped(self, state: Any, *, speaks: bool) -> None:
        """Ends the process if a signal has ended the training.

        Args:
            state (`TrainerState`): of the trainer.
            speaks (`bool`): whether this process says so.

        Raises:
            `SystemExit`: with 128 + the number of the signal.
        """
        if self.stopped_by is None:
            return
        if speaks:
            name = signal.Signals(self.stopped_by).name
            print(
                f"Interrupted by {name} after step {state.global_step} of {state.max_steps}, which is saved. Go on "
                "with --resume_from_checkpoint true.",
                file=sys.stderr,
                flush=True,
            )
        gc.freeze()  # taking all objects apart at the end can take longer than saving them did
        raise SystemExit(128 + self.stopped_by)


def _trains(frame: FrameType | None) -> bool:
    """Whether a frame is inside a call of `Trainer.train`."""
    while frame is not None and frame.f_code is not Trainer.train.__code__:
        frame = frame.f_back
    return frame is not None


@contextmanager
def ending_at_signals() -> Iterator[None]:
    """Ends the process with a sentence at a signal of [`STOP_SIGNALS`] that comes where no steps are taken. Only the
    main thread can handle any.

    Raises:
        `SystemExit`: with 128 + the number of the signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # for a second one
        if os.getpid() != process:
            signal.raise_signal(number)  # a forked worker
        if int(os.environ.get("LOCAL_RANK") or 0) == 0:
            name = signal.Signals(number).name
            print(f"Interrupted by {name}. Go on with --resume_from_checkpoint true.", file=sys.stderr, flush=True)
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, end) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


_watched: set[int] = set()


def end_with_launcher() -> None:
    """Has this process stop politely once the launcher that has started it has ended, and in any case half a minute
    later: nobody would end it, and the next start would meet it in its folder."""
    if not _HAS_LAUNCHER or os.getpid() in _watched:
        return
    _watched.add(os.getpid())
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def leave_signals_to_the_run(worker: int) -> None:
    """Initialises a loader worker: signals to a whole group of processes do not end it before the run that it serves
    has finished its step. Its loader may end it by SIGTERM, some seconds later."""

    def end_later(number: int, frame: Any) -> None:
        timer = threading.Timer(_GRACE_SECONDS / 3, os._exit, [1])
        timer.daemon = True
        timer.start()

    for number in STOP_SIGNALS:
        signal.signal(number, end_later if number == signal.SIGTERM else signal.SIG_IGN)
    if sys.platform == "linux":
        # A killed run takes its workers with it; torch has them look for it every five seconds.
        ctypes.CDLL(None).prctl(_SIGNAL_OF_PARENTS_END, signal.SIGKILL)
