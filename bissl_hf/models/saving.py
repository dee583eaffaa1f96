"""Checkpoints of `transformers` that are replaced as a whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .finite import check_finite_weights


def save_model(model: PreTrainedModel, directory: str | os.PathLike[str], processing_class: Any = None) -> None:
    """Writes a model, and beside it what prepares its inputs. Files are written aside first and synchronised with the
    disk, so that a failure, also one of the machine, leaves what is in `directory` as it was.

    Args:
        model (`PreTrainedModel`)
        directory (`str` or `os.PathLike`): created if need be.
        processing_class (*optional*): image processor or tokenizer.

    Raises:
        `ValueError`: if the model has weights that are not finite; nothing is written then.
    """
    check_finite_weights(model, "the training has diverged, and no model is written")
    with replacing_files(directory) as staging:
        model.save_pretrained(staging)
        if processing_class is not None:
            processing_class.save_pretrained(staging)


@contextmanager
def replacing_files(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder to write files into, which move into `directory` once all are written and on the disk. They get
    the permissions that files of this process get.

    Args:
        directory (`str` or `os.PathLike`): created if need be.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=directory) as staging:
        yield Path(staging)
        permissions = _new_file_permissions(Path(staging))
        for path in sorted(Path(staging).rglob("*")):
            if path.is_file():
                path.chmod(permissions)
                _synchronise(path)
        for path in sorted(Path(staging).iterdir()):
            if path.is_dir():
                shutil.rmtree(directory / path.name, ignore_errors=True)
            path.replace(directory / path.name)
    _synchronise(directory)


def _new_file_permissions(folder: Path) -> int:
    """The permissions of a file that is created here: those of the umask. The umask itself can only be read by
    changing it, which other threads would notice."""
    probe = folder / ".permissions"
    probe.touch()
    permissions = probe.stat().st_mode & 0o777
    probe.unlink()
    return permissions


def _synchronise(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
