"""A folder belongs to one run at a time: a lock that ends with its owner."""

import atexit
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .distributed import from_first_process
from .text import for_terminal

LOCK_NAME = ".run.lock"
# An owner on another machine renews its lock; one that has not done so for long has ended.
_RENEW_SECONDS = 20.0
_STALE_SECONDS = 120.0


class RunLock:
    """The lock of a folder, held from the moment this is made.

    It is a lock of the kernel on a file in the folder (`fcntl`), which ends with the process however that ends, and is
    not inherited by loader workers. Where the file system has none, the process that the file names decides. An owner
    on another machine, whose lock not every file system passes on, is believed for as long as it renews the file.

    Args:
        folder (`Path`): created if need be.

    Raises:
        `ValueError`: if another run holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK_NAME
        self._stream = self._open()
        owner = _read(self._stream)
        if owner and _is_alive(owner, self.path):
            self._stream.close()
            raise ValueError(_refusal(self.path, owner))
        if owner:
            print(f"Taking over {for_terminal(folder)} from {_name(owner)}, which has ended.", file=sys.stderr)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        self._stream.seek(0)
        self._stream.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started": started}, self._stream)
        self._stream.flush()
        self._released = threading.Event()
        self._pid = os.getpid()
        threading.Thread(target=self._renew, daemon=True).start()

    def _open(self) -> IO[str]:
        """Opens the file and locks it; again where its owner has removed it meanwhile. A link in its place is not
        followed: what it points to would be emptied."""
        while True:
            if self.path.is_symlink():
                raise ValueError(f"output_dir {self.path.parent} has a link in the place of {LOCK_NAME}: remove it.")
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            stream = os.fdopen(os.open(self.path, flags, 0o666), "a+", encoding="utf-8")
            try:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                owner = _read(stream)
                stream.close()
                raise ValueError(_refusal(self.path, owner)) from error
            except OSError:
                return stream  # no locks here
            if self.path.exists() and self.path.stat().st_ino == os.fstat(stream.fileno()).st_ino:
                return stream
            stream.close()

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            if self.path.exists():
                os.utime(self.path)

    def release(self) -> None:
        """Gives the folder back. A forked process does not own what it has inherited."""
        if self._pid == os.getpid() and not self._released.is_set():
            self._released.set()
            self.path.unlink(missing_ok=True)
            self._stream.close()


def _read(stream: IO[str]) -> dict[str, Any]:
    """Returns what a lock says of its owner; nothing if that was never written."""
    stream.seek(0)
    try:
        owner = json.load(stream)
        return {name: for_terminal(owner[name]) for name in ("pid", "host", "started")}
    except (ValueError, LookupError, TypeError):
        return {}


def _is_alive(owner: dict[str, Any], path: Path) -> bool:
    """Whether the owner of a lock that could be taken is alive all the same."""
    if owner["host"] != socket.gethostname():
        # Both times are those of the file system, whatever the clocks of the machines say.
        with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - path.stat().st_mtime < _STALE_SECONDS
    return _has_no_kernel_locks(path) and owner["pid"] != str(os.getpid()) and Path(f"/proc/{owner['pid']}").exists()


def _has_no_kernel_locks(path: Path) -> bool:
    with tempfile.NamedTemporaryFile(dir=path.parent) as probe:
        try:
            fcntl.lockf(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _name(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']} (started {owner['started']})" if owner else "another process"


def _refusal(path: Path, owner: dict[str, Any]) -> str:
    return (
        f"output_dir {path.parent} is in use by {_name(owner)}. Wait until that run has ended, or choose another "
        "output_dir."
    )


_held: dict[Path, RunLock] = {}


def hold_folder(folder: str | os.PathLike[str]) -> bool:
    """Takes the lock of a folder until this process ends or releases it. Returns whether it did: not where this
    process holds it already.

    Raises:
        `ValueError`: if another run holds it.
    """
    resolved = Path(folder).resolve()
    held = _held.get(resolved)
    if held is not None and held.path.exists():
        return False
    _held[resolved] = RunLock(resolved)
    return True


def release_folder(folder: str | os.PathLike[str]) -> None:
    """Releases the lock of a folder, if this process holds it."""
    if (lock := _held.pop(Path(folder).resolve(), None)) is not None:
        lock.release()


def hold_for_run(folder: str | os.PathLike[str], *, writes: bool) -> bool:
    """Takes the lock of a run's folder, as [`hold_folder`] does, for all processes of the run. Called on each of them,
    it returns the same.

    Args:
        folder (`str` or `os.PathLike`): the output folder.
        writes (`bool`): whether this is the process that takes it: the first one.

    Raises:
        `ValueError`: on each process, if another run holds it.
    """
    taken, refusal = False, None
    if writes:
        try:
            taken = hold_folder(folder)
        except ValueError as error:
            refusal = str(error)
    taken, refusal = from_first_process((taken, refusal))
    if refusal is not None:
        raise ValueError(refusal)
    return taken


@contextmanager
def releasing_folders() -> Iterator[None]:
    """Releases at its end the folders that were taken meanwhile."""
    before = set(_held)
    try:
        yield
    finally:
        for folder in set(_held) - before:
            release_folder(folder)


@contextmanager
def holding_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a folder meanwhile, and goes on to hold one that was held before."""
    taken = hold_folder(folder)
    try:
        yield
    finally:
        if taken:
            release_folder(folder)


@atexit.register
def _release_all() -> None:
    for folder in list(_held):
        release_folder(folder)
