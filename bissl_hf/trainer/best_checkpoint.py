"""The best checkpoint of a run, found again wherever the run's folder lies now."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoints import find_defect


def check_best_checkpoint(checkpoint: Path, best: str | None) -> None:
    """Refuses to go on from a checkpoint without the best one, which the end of the run would need.

    Args:
        checkpoint (`Path`): the one to go on from.
        best (`str`, *optional*): name of the best one so far, which lies beside it.

    Raises:
        `ValueError`: with what is missing and what to do.
    """
    if best is not None and (defect := find_defect(checkpoint.with_name(best))):
        raise ValueError(
            f"{best} is the best checkpoint so far by what {checkpoint} says, and load_best_model_at_end needs it at "
            f"the end; but {checkpoint.with_name(best)} is not whole: {defect}. Put it there, or set "
            "load_best_model_at_end to false."
        )


class BestCheckpoint(TrainerCallback):
    """Tells a resumed run which checkpoint is the best so far.

    Trainer keeps the path that it had, which is another one once the folder has been moved or fetched from the Hub,
    and nobody's business there; a run keeps its name.
    """

    def __init__(self) -> None:
        self._found: Path | None = None

    def find(self, checkpoint: Path, best: str | None) -> None:
        """Notes where the best one lies, if it does, before a run goes on from a checkpoint beside it."""
        found = checkpoint.with_name(best) if best is not None else None
        self._found = found if found is not None and found.is_dir() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._found is not None:
            state.best_model_checkpoint, self._found = str(self._found), None
