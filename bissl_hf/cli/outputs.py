"""The folder of a run, and tables of text."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME

from ..checkpoints import DamagedFileError, find_defect, find_last_checkpoint, read_mapping
from ..hub.folder import fetch_last_checkpoint
from ..run_lock import LOCK_NAME, hold_for_run
from ..text import for_terminal

RESUME_FROM_HUB = "hub"
RUN_RESULTS = "all_results.json"


def open_output_dir(
    output_dir: str,
    resume: str | bool | None,
    *,
    leaves: Sequence[str] = (),
    repo_id: str | None = None,
    revision: str | None = None,
) -> Path | None:
    """Checks that a run may use its folder, and finds the checkpoint to go on from.

    Args:
        output_dir (`str`): created if need be.
        resume (`str` or `bool`, *optional*): a checkpoint; true for the newest whole one; or `hub` for that of the
            repository where the folder has none.
        leaves (`Sequence[str]`, *optional*): patterns of what an unfinished run leaves in its folder. A model that
            is there without any of them comes from something else, and would be written over.
        repo_id (`str`, *optional*): repository of the run, by the name of the folder if not given.
        revision (`str`, *optional*): its branch.

    Returns:
        `Path | None`: the checkpoint.

    Raises:
        `ValueError`: if the folder holds a run and `resume` is not given, or one of another kind, or the checkpoint is
            missing or not whole.
        `OSError`: if the folder cannot be written to.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"output_dir {folder} cannot be written to ({error.strerror or error}); choose another."
        ) from error
    wants = resume if isinstance(resume, bool) else str(resume or "").lower()
    if wants in (False, "", "false", "none"):
        finished = (folder / RUN_RESULTS).is_file()
        started = any(path.name != LOCK_NAME for path in folder.iterdir())
        if finished or started:
            state = "a finished run" if finished else "files, maybe of an unfinished run"
            raise ValueError(
                f"output_dir {folder} holds {state}; pass --resume_from_checkpoint true to go on with it, or choose "
                "another."
            )
        return None
    if leaves and (folder / CONFIG_NAME).is_file() and not any(any(folder.glob(pattern)) for pattern in leaves):
        raise ValueError(
            f"output_dir {folder} holds a model and nothing that this recipe could go on with ({', '.join(leaves)}); "
            "choose another."
        )
    if wants not in (True, "true", RESUME_FROM_HUB):
        return _named_checkpoint(Path(str(resume)), folder)
    checkpoint, passed_over = find_last_checkpoint(folder)
    for path, defect in passed_over.items():
        print(f"Passing over {path}, which is not whole: {defect}.", file=sys.stderr)
    if checkpoint is None and wants == RESUME_FROM_HUB:
        repo_id = repo_id or folder.absolute().name
        checkpoint = fetch_last_checkpoint(repo_id, folder, revision=revision)
        if checkpoint is None:
            print(f"The Hub has no checkpoint of {repo_id} yet: the run starts from its beginning.", file=sys.stderr)
    return checkpoint


def _named_checkpoint(named: Path, folder: Path) -> Path:
    """Returns the checkpoint that a user has named, if a run in `folder` can go on from it."""
    if not named.is_dir():
        raise ValueError(f"resume_from_checkpoint is {named}; there is no such folder. Pass true for the newest one.")
    if defect := find_defect(named):
        raise ValueError(
            f"resume_from_checkpoint is {named}, which is not whole: {defect}. Pass true for the newest that is."
        )
    if named.resolve().parent != folder.resolve():
        raise ValueError(
            f"resume_from_checkpoint is {named}, which is not in output_dir {folder}. A run goes on in its own "
            f"folder: set output_dir to {named.parent}."
        )
    return named


def open_run(args: TrainingArguments, *, leaves: Sequence[str]) -> Path | None:
    """Opens the output folder of a run (see [`open_output_dir`]), on the first process of a machine before the others:
    they find what it has fetched, and none writes there before all have looked."""
    with args.main_process_first(desc="looking for a checkpoint"):
        checkpoint = open_output_dir(
            str(args.output_dir),
            args.resume_from_checkpoint,
            leaves=leaves,
            repo_id=args.hub_model_id,
            revision=args.hub_revision,
        )
    PartialState().wait_for_everyone()
    hold_for_run(str(args.output_dir), writes=args.process_index == 0)
    return checkpoint


def kept_results(file: Path, *, speaks: bool) -> dict[str, Any] | None:
    """Returns what an earlier start has kept in a file; `None` if there is none, or a damaged one.

    Args:
        file (`Path`): written by [`write_mapping`].
        speaks (`bool`): whether this process says that it passes over a damaged one.
    """
    if not file.is_file():
        return None
    try:
        return read_mapping(file)
    except DamagedFileError:
        if speaks:
            print(f"Passing over {file}, which is empty or damaged: it is made anew.", file=sys.stderr)
        return None


@contextmanager
def afterwards(what: str) -> Iterator[None]:
    """Has what comes after a finished run (a figure, a card, a line) fail with a warning: the results are there.

    Args:
        what (`str`): what is made, for the message.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        message = f"warning: {what} failed, and the run's results are whole without it: {reason}\n"
        sys.stderr.write(for_terminal(message.strip()).encode("ascii", "backslashreplace").decode() + "\n")


def name_metrics(metrics: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Returns the metrics of a classifier that an evaluation under `prefix` has left, as they are shown to users: the
    one by which models are compared first."""
    names = {
        "accuracy": "accuracy",
        "map": "11-point mAP",
        "top5_accuracy": "top-5 accuracy",
        "mean_class_accuracy": "mean per class",
    }
    shares = {name: metrics.get(f"{prefix}_{key}") for key, name in names.items()}
    found = {name: f"{100 * value:.2f} %" for name, value in shares.items() if value is not None}
    of_regression = {name: metrics.get(f"{prefix}_{name}") for name in ("r2", "mae", "rmse")}
    return found | {name: f"{value:.4g}" for name, value in of_regression.items() if value is not None}
