"""Loader workers that hang or have died: one sentence, and none of them is left."""

import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# What torch (2.6 to 2.13, 2026-11) says of its workers: of one that hangs, and of one that has ended. The second comes
# from a signal handler, and so from wherever the process is.
_HANGS = re.compile(r"DataLoader timed out after ([0-9.]+) seconds")
_ENDED = re.compile(r"DataLoader worker \(pid.*\) (?:is killed by|exited unexpectedly)")

_GRACE_SECONDS = 1.0  # for torch's own time-out
_END_SECONDS = 5.0  # one that waits for storage cannot be killed


class LoaderWorkerError(RuntimeError):
    """A loader worker hangs or has died."""


@contextmanager
def explaining_lost_workers(seconds: float = 0.0) -> Iterator[None]:
    """Says what to do where a loader worker hangs or has died, and ends all of them: this process would wait for one
    that hangs before it ends.

    Args:
        seconds (`float`, *optional*): the time-out of the loader, if the body waits for one batch. A worker that is
            stopped keeps the memory of a batch that it has announced, and torch's time-out does not end that wait.

    Raises:
        [`LoaderWorkerError`]: in the place of torch's errors.
    """
    ended = threading.Event()
    timer = threading.Timer(seconds + _GRACE_SECONDS, _kill_workers, [ended])
    timer.daemon = True
    if seconds:
        timer.start()
    try:
        yield
    except LoaderWorkerError:
        raise
    except (RuntimeError, ConnectionError, EOFError) as error:
        if (hangs := _HANGS.search(str(error))) or ended.is_set():
            found = (
                f"no loader worker gave a batch within {hangs[1] if hangs else f'{seconds:g}'} seconds. Look whether "
                "the storage of the data answers, or raise dataloader_timeout"
            )
        elif _ENDED.search(str(error)):
            found = "a loader worker has ended, mostly for lack of memory. Take fewer (dataloader_num_workers)"
        else:
            raise
        _end_workers()
        raise LoaderWorkerError(
            f"The run has stopped: {found}, and go on from the last checkpoint (resume_from_checkpoint)."
        ) from error
    finally:
        timer.cancel()


def _kill_workers(ended: threading.Event) -> None:
    ended.set()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _end_workers() -> None:
    """Kills the workers of this process. Meanwhile torch's handler is away, which would raise an error for each."""
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main else None
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    for process in workers:
        process.kill()
    for process in workers:
        process.join(_END_SECONDS)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)
