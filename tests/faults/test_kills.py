"""Runs that are killed, and disks that fail, at any moment: what goes on ends as if nothing had happened."""

import errno
import random
import signal
from pathlib import Path

import pytest

from bissl_hf.checkpoints import find_last_checkpoint

from .harness import TRAINERS, Fault, is_same_end, kill_after, run, start

CHECKPOINTS, TRAINER = "bissl_hf.checkpoints", "bissl_hf.trainer.resumable_trainer"
# Around and inside each part of a save: of the second one, or of a later one.
MOMENTS = {
    "weights": (f"{TRAINER}:ResumableTrainer", "_save"),
    "state": (CHECKPOINTS, "save_file"),
    "checksums": (CHECKPOINTS, "_checksum"),
    "manifest": (TRAINER, "write_manifest"),
    "to the disk": (CHECKPOINTS, "synchronise"),
    "rename": (TRAINER, "publish"),
    "rotation": (TRAINER, "rotate_checkpoints"),
    "a step": ("bissl_hf.bilevel.level_losses:LevelLosses", "upper_gradient"),
    "a solve": ("bissl_hf.bilevel.upper_phase:UpperPhase", "solve"),
}


def go_on(kind: str, folder: Path) -> None:
    assert run(kind, folder) == 0


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, pytest.param(5, marks=pytest.mark.soak)])
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_moment(tmp_path, whole, moment, call):
    assert (
        run("bissl", tmp_path, Fault(*MOMENTS[moment], call if moment != "a solve" else call - 1)) == -signal.SIGKILL
    )
    go_on("bissl", tmp_path)
    assert is_same_end(tmp_path, whole["bissl"])


@pytest.mark.slow
def test_killed_between_the_last_checkpoint_and_the_end(tmp_path, whole):
    """A run that is complete and not yet written takes no further step, however often it is started."""
    fault = Fault("bissl_hf.trainer.callbacks:EpochBoundary", "on_train_end", 1)
    for _ in range(2):
        assert run("pretext", tmp_path, fault) == -signal.SIGKILL
    newest, _ = find_last_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-5"
    go_on("pretext", tmp_path)
    assert is_same_end(tmp_path, whole["pretext"])


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", TRAINERS)
def test_killed_at_random_moments(tmp_path, whole, kind, seed):
    """A chain of starts, each killed after a random time, until one reaches its end."""
    moments = random.Random(f"{kind} {seed}")
    for _ in range(4):
        kill_after(start(kind, tmp_path), moments.uniform(0.2, 3.0))
    go_on(kind, tmp_path)
    assert is_same_end(tmp_path, whole[kind])


@pytest.mark.soak
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("moment", ["weights", "state", "manifest", "to the disk", "rename", "rotation"])
def test_a_disk_that_fails(tmp_path, whole, moment, error):
    assert run("bissl", tmp_path, Fault(*MOMENTS[moment], 3, error, raises=True)) == 1
    go_on("bissl", tmp_path)
    assert is_same_end(tmp_path, whole["bissl"])
