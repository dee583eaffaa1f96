"""Decoded images in a file: whole or not there, its room taken before the work, found again by later runs."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import datasets
import huggingface_hub.constants
import numpy as np

_PREFIX = "incomplete-"
_HOW_TO_MOVE = "set HF_DATASETS_CACHE (or HF_HOME) to a folder on another disk, or pass `cache_dir`"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


def explain_cache_error(error: BaseException | None, folder: Path, need: int | None = None) -> str | None:
    """Returns one sentence if an error, or what caused it, is that a cache folder is full or cannot be written; else
    `None`.

    Args:
        error (`BaseException`, *optional*)
        folder (`Path`): of the cache.
        need (`int`, *optional*): bytes that are to be written, if known.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            needed = f"{need:,} bytes are needed and " if need is not None else ""
            return f"The cache folder {str(folder)!r} has no room: {needed}{_free(folder):,} are free; {_HOW_TO_MOVE}."
        if isinstance(error, OSError) and error.errno in _NO_ACCESS and _concerns(error, folder):
            return f"The cache folder {str(folder)!r} cannot be written: {error.strerror}; {_HOW_TO_MOVE}."
        error = error.__cause__ or error.__context__
    return None


def refuse_cache(error: BaseException) -> None:
    """Raises what is behind an error of `datasets` if that is its cache, rather than the data.

    Raises:
        `ValueError`: see [`explain_cache_error`].
    """
    for folder in (datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE):
        if sentence := explain_cache_error(error, Path(folder)):
            raise ValueError(sentence) from error


def write_pixels(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    """Writes an array of uint8 to a file that appears under its name only when it is whole, whatever else is writing
    it. What earlier processes left unfinished is removed.

    Args:
        path (`Path`): the `.npy` file.
        shape (`tuple[int, ...]`)
        fill (`Callable`): fills the array, whose values are 0.

    Raises:
        `ValueError`: before the work, if the folder has no room for it or cannot be written.
    """
    need = int(np.prod(shape)) + 128
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path.parent)
            file = stack.enter_context(_unfinished_file(path))
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.flush()
            _reserve(file, int(np.prod(shape)))
        except OSError as error:
            raise ValueError(explain_cache_error(error, path.parent, need) or str(error)) from error
        array = np.memmap(file, mode="r+", dtype=np.uint8, offset=file.tell(), shape=shape)
        fill(array)
        array.flush()
        # Without this a crash of the machine may leave a file of the right size that holds zeros.
        os.fsync(file.fileno())
        os.replace(file.name, path)


def map_pixels(path: Path) -> np.ndarray:
    """Returns the array of a file, mapped into memory."""
    return np.asarray(np.lib.format.open_memmap(path, mode="r"))


def is_whole(path: Path, rows: int) -> bool:
    """Whether a file holds what its header says, for this number of images. It is removed where it does not, as after
    a full disk or a damaged copy."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            whole = path.stat().st_size == file.tell() + int(np.prod(shape, dtype=object))
    except OSError:
        return False
    except (ValueError, EOFError, OverflowError):
        whole = False
    if whole and not fortran_order and dtype == np.uint8 and len(shape) == 4 and shape[0] == rows and shape[1] == 3:
        return True
    # Another process may have done it.
    path.unlink(missing_ok=True)
    return False


def remember_rows(path: Path, rows: Sequence[int]) -> None:
    """Writes row numbers beside the files of pixels, so that later runs need not find them again."""
    if not path.parent.is_dir():
        return  # the images are few and decoded in memory each time
    with _unfinished_file(path) as file:
        file.write(json.dumps(list(rows)).encode())
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)


def read_rows(path: Path, total: int) -> list[int]:
    """Returns the row numbers in a file, and none if there is no such file or it is damaged."""
    try:
        rows = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return []
    whole = isinstance(rows, list) and all(isinstance(row, int) and 0 <= row < total for row in rows)
    return rows if whole and len(rows) < total else []


@contextlib.contextmanager
def _unfinished_file(path: Path) -> Iterator[IO[bytes]]:
    """Opens a new file beside `path`, locked while this process lives, and removed if it still has its name."""
    while True:
        name = path.with_name(f"{_PREFIX}{uuid.uuid4().hex}{path.suffix}")
        file = name.open("x+b")
        # Not every network disk has locks. Then nothing is taken for a leftover either.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between its creation and the lock another process may have taken it for a leftover.
        if name.exists():
            break
        file.close()
    try:
        yield file
    finally:
        file.close()
        name.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that no longer live were writing."""
    for leftover in folder.glob(f"{_PREFIX}*"):
        # Earlier versions wrote into folders of this name.
        files = [leftover] if leftover.is_file() else list(leftover.iterdir())
        if all(map(_is_abandoned, files)):
            shutil.rmtree(leftover, ignore_errors=True) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _reserve(file: IO[bytes], size: int) -> None:
    """Takes the room of a file on its disk. A file with holes would end in a bus error when the disk is full."""
    start = file.tell()
    folder = Path(file.name).parent
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, start + size)
            return
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    if _free(folder) < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    os.truncate(file.fileno(), start + size)


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _concerns(error: OSError, folder: Path) -> bool:
    """Whether an error is about a folder, something in it, or what it is in."""
    path, name = os.path.abspath(folder), str(error.filename or "")
    return path in str(error) or (name != "" and f"{path}{os.sep}".startswith(os.path.abspath(name) + os.sep))
