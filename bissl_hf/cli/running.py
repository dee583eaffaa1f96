"""What every command that trains does around its run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import PartialState

from ..run_lock import releasing_folders
from ..trainer.signals import ending_at_signals
from .arguments import stopping_at_divergence


@contextmanager
def as_a_run() -> Iterator[None]:
    """Ends the process with a sentence and an exit code of its own where a run diverges, finds a damaged file, loses a
    loader worker or is interrupted, and gives back the folders that it has taken."""
    with ending_at_signals(), stopping_at_divergence(), releasing_folders():
        yield


def check_one_process(name: str, *, cpu: bool) -> None:
    """Refuses several processes where one does the work; also those that do not know of each other, as a launcher
    starts them on a machine without GPUs.

    Args:
        name (`str`): what runs, for the message.
        cpu (`bool`): whether it is to use no accelerator.

    Raises:
        `ValueError`: with their number.
    """
    processes = max(PartialState(cpu=cpu).num_processes, int(os.environ.get("WORLD_SIZE") or 1))
    if processes > 1:
        raise ValueError(f"{name} runs on {processes} processes; start it on one: --num_processes 1.")
