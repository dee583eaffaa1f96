"""What every command that trains does around its run."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..run_lock import releasing_folders
from ..trainer.signals import ending_at_signals
from .arguments import stopping_at_divergence


@contextmanager
def as_a_run() -> Iterator[None]:
    """Ends the process with a sentence and an exit code of its own where a run diverges, finds a damaged file or is
    interrupted, and gives back the folders that it has taken."""
    with ending_at_signals(), stopping_at_divergence(), releasing_folders():
        yield
