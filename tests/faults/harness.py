"""Runs in processes of their own, with a fault at a chosen call, and what they must end with."""

import importlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bissl_hf.checkpoints import find_last_checkpoint, write_json

from ..processes import start_forked
from ..trainer import test_joint_trainer, test_pretext_trainer, trainers

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_strategy": "epoch"}


def _bissl(folder: str) -> Any:
    return trainers.make_trainer(folder, eval_rows=5, eval_strategy="epoch", **SAVING)


def _pretext(folder: str) -> Any:
    return test_pretext_trainer.make_trainer(folder, max_steps=5, num_train_epochs=1, **SAVING)


def _joint(folder: str) -> Any:
    return test_joint_trainer.make_trainer(folder, num_train_epochs=2, **SAVING)


TRAINERS: dict[str, Callable[[str], Any]] = {"bissl": _bissl, "pretext": _pretext, "joint": _joint}


@dataclass(frozen=True)
class Fault:
    """What happens at a call of a function.

    Args:
        owner (`str`): module, or module and class after a colon.
        name (`str`): of the function.
        call (`int`): which call, from 1.
        number (`int`): of a signal to this process, or of an error of the operating system if `raises`.
        raises (`bool`): whether the function raises that error.
    """

    owner: str
    name: str
    call: int
    number: int = signal.SIGKILL
    raises: bool = False

    def arm(self) -> None:
        module, _, inner = self.owner.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, inner) if inner else owner
        function, calls = getattr(owner, self.name), [0]

        def faulty(*arguments: Any, **keywords: Any) -> Any:
            calls[0] += 1
            if calls[0] == self.call and self.raises:
                raise OSError(self.number, os.strerror(self.number))
            if calls[0] == self.call:
                os.kill(os.getpid(), self.number)
            return function(*arguments, **keywords)

        setattr(owner, self.name, faulty)


def train(kind: str, folder: str, fault: Fault | None = None) -> None:
    """Trains, or goes on from the newest whole checkpoint, and leaves the weights and the logged losses."""
    trainer = TRAINERS[kind](folder)
    if fault is not None:
        fault.arm()
    checkpoint, _ = find_last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    losses = [{name: row[name] for name in row if name.endswith("loss")} for row in trainer.state.log_history]
    save_file({name: value.clone() for name, value in trainer.model.state_dict().items()}, f"{folder}/end.safetensors")
    write_json(Path(folder) / "losses.json", [row for row in losses if row and "train_loss" not in row])


def start(kind: str, folder: Path, fault: Fault | None = None) -> BaseProcess:
    """Starts [`train`] in a process of its own."""
    return start_forked(train, kind, str(folder), fault)


def run(kind: str, folder: Path, fault: Fault | None = None) -> int:
    """Runs [`train`] to its end; returns the exit code of the process, negative for a signal."""
    process = start(kind, folder, fault)
    process.join(120)
    assert process.exitcode is not None, "the run does not end"
    return process.exitcode


def kill_after(process: BaseProcess, seconds: float) -> None:
    """Kills a process after some time."""
    time.sleep(seconds)
    process.kill()
    process.join()


def end_of(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Returns the weights and the logged losses that a finished run has left."""
    return load_file(folder / "end.safetensors"), (folder / "losses.json").read_text()


def is_same_end(folder: Path, other: Path) -> bool:
    """Whether two finished runs are the same, bit for bit."""
    (weights, losses), (other_weights, other_losses) = end_of(folder), end_of(other)
    same = list(weights) == list(other_weights)
    return same and losses == other_losses and all(torch.equal(weights[name], other_weights[name]) for name in weights)
