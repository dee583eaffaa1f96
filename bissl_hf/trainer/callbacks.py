"""Callbacks of all trainers: the best checkpoint, the lock of the folder, the end of an epoch."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import CONFIG_NAME

from ..checkpoints import find_last_checkpoint
from ..data.alternation import AlternatingDataLoader
from ..run_lock import hold_for_run, release_folder


class BestCheckpoint(TrainerCallback):
    """Knows which checkpoint is the best so far, by name.

    Trainer keeps its path, which is another one once the folder has been moved or fetched from the Hub, and which must
    not be published.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._found: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the name."""
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the name."""
        self.name = state["name"]

    def find_beside(self, checkpoint: Path) -> None:
        """Notes where the best checkpoint is, before a run goes on from a checkpoint beside it."""
        found = checkpoint.with_name(self.name) if self.name is not None else None
        self._found = found if found is not None and found.is_dir() else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._found is not None:
            state.best_model_checkpoint, self._found = str(self._found), None


class OneRunInFolder(TrainerCallback):
    """Holds the lock of the output folder while a run trains, unless this process holds it for longer, and refuses to
    begin a run in a folder that holds another one, which it would write over. The trials of a search may run at once:
    each has a folder of its own in it."""

    def __init__(self) -> None:
        self._taken = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the lock and looks into the folder.

        Raises:
            `ValueError`: if another run uses it, or if it holds one; with the ways out.
        """
        if state.is_hyper_param_search:
            return
        taken = hold_for_run(args.output_dir, writes=args.process_index == 0)
        self._taken |= taken
        if state.global_step or not taken:
            return  # who has held the folder for longer has looked into it
        try:
            _check_holds_no_run(Path(str(args.output_dir)))
        except ValueError:
            self.on_train_end(args, state, control)
            raise

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._taken:
            release_folder(args.output_dir)
            self._taken = False


def _check_holds_no_run(folder: Path) -> None:
    # Those that are damaged are none: a run that finds no other starts from its beginning.
    last, _ = find_last_checkpoint(folder)
    found = [last.name] if last else []
    found += [name for name in (CONFIG_NAME, "all_results.json") if (folder / name).is_file()]
    if found:
        raise ValueError(
            f"output_dir {folder} holds a run ({', '.join(found[:3])}), which would be written over; go on with "
            "it by train(resume_from_checkpoint=True), or choose another output_dir."
        )


class EpochBoundary(TrainerCallback):
    """Keeps a checkpoint of the last step of an epoch, or of the run, until the log and the evaluation of that epoch
    are done, so that a resume from it misses neither; and ends the workers of the loader after training."""

    def __init__(self) -> None:
        self._waiting = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ends_epoch = float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if control.should_save and ends_epoch:
            control.should_save, self._waiting = False, True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        whole = state.epoch is None or float(state.epoch).is_integer() or state.global_step >= state.max_steps
        if not whole:
            # Asked to stop inside an epoch: its figures are kept in the checkpoint, and logged when it is complete.
            control.should_log = control.should_evaluate = False
        if self._waiting:
            control.should_save, self._waiting = True, False

    def on_train_end(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if isinstance(train_dataloader, AlternatingDataLoader):
            train_dataloader.close()
