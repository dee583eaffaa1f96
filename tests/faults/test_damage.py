"""A flipped bit in each file of a checkpoint, clocks that jump, and copies without their times."""

import os
import shutil
from pathlib import Path

import pytest

from bissl_hf.checkpoints import find_defect, find_last_checkpoint, list_checkpoints

from ..conftest import flip_a_bit
from .harness import TRAINERS, is_same_end, run


def copy_of(folder: Path, place: Path) -> Path:
    """A run as it was before its end."""
    copy = shutil.copytree(folder, place, copy_function=shutil.copyfile)
    for name in ("end.safetensors", "losses.json"):
        (copy / name).unlink()
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("at", [0.0, 0.37, 1.0])
def test_a_flipped_bit_in_any_file_is_found(tmp_path, whole, at):
    copy = copy_of(whole["bissl"], tmp_path / "run")
    older, newest = list_checkpoints(copy)
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) >= 7
    for name in files:
        flip_a_bit(newest / name, at)
        last, passed_over = find_last_checkpoint(copy)
        assert last == older, name
        assert str(name) in passed_over[newest]
        flip_a_bit(newest / name, at)
        assert find_defect(newest) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, whole, kind):
    copy = copy_of(whole[kind], tmp_path / "run")
    _, newest = list_checkpoints(copy)
    for name in ("model.safetensors", "optimizer.pt"):
        flip_a_bit(newest / name)
    assert run(kind, copy) == 0
    assert is_same_end(copy, whole[kind])


@pytest.mark.slow
@pytest.mark.parametrize("times", [(2e9, 1e9), (1e9, 2e9), (0.0, 0.0)], ids=["backwards", "forwards", "none"])
def test_whatever_the_clock_says_the_newest_step_counts(tmp_path, whole, times):
    copy = copy_of(whole["pretext"], tmp_path / "run")
    older, newest = list_checkpoints(copy)
    shutil.rmtree(newest)
    for path, time in ((older, times[0]), (copy, times[1])):
        os.utime(path, (time, time))
    assert run("pretext", copy) == 0
    assert [path.name for path in list_checkpoints(copy)] == [older.name, newest.name]
    assert is_same_end(copy, whole["pretext"])
