"""Which files of a run are on the Hub, and where.

config.json model.safetensors ...   the model as its users load it          bilevel/   both levels, for going on
README.md all_results.json          figures/
last-checkpoint/ or checkpoint-N/   what a resume needs
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import get_token
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..cards.writing import CARD_NAME
from ..checkpoints import MANIFEST_NAME, STAGING_FOLDER, find_defect, publish
from ..paths import is_inner_name, is_own_file, own_files
from ..text import for_terminal
from .process import DownloadJob, HubProcess

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
# What the output folder holds beside is not pushed: it may be anything, or a card beside the user's own.
_ROOT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_FOLDERS = ("bilevel", "figures")
_FOLDER_SUFFIXES = (*_ROOT_SUFFIXES, ".png")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT_BYTES = 20_000_000


def outputs_of_run(output_dir: Path, *, except_for: Iterable[str] = ()) -> Iterator[tuple[Path, str]]:
    """Yields the files of an output folder that belong on the Hub, with their paths there, checkpoints left out. No
    symbolic link is followed."""
    for path in sorted(output_dir.iterdir()):
        name = path.name
        if name in _FOLDERS:
            found = [file for file in own_files(output_dir, name) if file.endswith(_FOLDER_SUFFIXES)]
        else:
            belongs = name == CARD_NAME or (name.endswith(_ROOT_SUFFIXES) and not name.startswith("."))
            found = [name] if belongs and name not in except_for and is_own_file(output_dir, name) else []
        yield from ((output_dir / file, file) for file in found)


def files_of_checkpoint(checkpoint: Path, path_in_repo: str) -> Iterator[tuple[Path, str]]:
    """Yields the files of a whole checkpoint with their paths on the Hub: those that its manifest names, as far as
    they are regular files inside it."""
    for name in (*json.loads((checkpoint / MANIFEST_NAME).read_text())["files"], MANIFEST_NAME):
        if is_inner_name(name) and is_own_file(checkpoint.parent, f"{checkpoint.name}/{name}"):
            yield checkpoint / name, f"{path_in_repo}/{name}"
        else:
            logger.warning(f"{checkpoint} names {for_terminal(name)}, which is no file inside it and is not pushed.")


def files_beside_checkpoint(output_dir: Path, names: Iterable[str], path_in_repo: str) -> Iterator[tuple[Path, str]]:
    """Yields the files of the output folder that a resume needs too: files by name, and folders with all they hold.
    No symbolic link is followed."""
    for name in filter(is_inner_name, names):
        for file in own_files(output_dir, name):
            yield output_dir / file, f"{path_in_repo}/{file}"


def lay_out(files: Iterable[tuple[Path, str]], tree: Path) -> None:
    """Puts files into a tree by their paths there, as hard links where the file system has them: they stay what they
    are when a run replaces or deletes its own. A file with a token in it is left out with a warning.

    Raises:
        `ValueError`: if a path leads out of the tree.
    """
    for source, path_in_repo in files:
        if not is_inner_name(path_in_repo):
            raise ValueError(f"{for_terminal(path_in_repo)} is no path inside a repository; nothing of it is pushed.")
        if holds_token(source):
            logger.warning(f"{source} holds a token of the Hub and is not pushed.")
            continue
        target = tree / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
        except (OSError, NotImplementedError):  # another device, or a file system without links
            shutil.copy2(source, target, follow_symlinks=False)
        if target.is_symlink():  # put there since it was looked at
            target.unlink()


def holds_token(path: Path) -> bool:
    """Whether a file holds a token of the Hub, the user's own above all. Weights are not searched."""
    if path.suffix == ".safetensors" or path.stat().st_size > _LARGEST_TEXT_BYTES:
        return False
    content, token = path.read_bytes(), get_token()
    return bool(_TOKEN.search(content)) or (token is not None and token.encode() in content)


def fetch_last_checkpoint(
    repo_id: str, output_dir: str | os.PathLike[str], *, revision: str | None = None
) -> Path | None:
    """Downloads `last-checkpoint/` of a repository, so that a run goes on from it in a folder that is empty.

    Args:
        repo_id (`str`): a repository that a run with `hub_strategy="checkpoint"` has pushed to.
        output_dir (`str`): folder of the run, created if need be.
        revision (`str`, *optional*): branch or commit; `main` if not given.

    Returns:
        `Path | None`: the checkpoint in the run's folder, `checkpoint-N`; nothing if the repository has none.

    Raises:
        `ValueError`: if the Hub refuses the token, or the checkpoint there is not whole.
        `OSError`: if the Hub does not answer.
    """
    folder = Path(output_dir)
    staging = folder / STAGING_FOLDER
    shutil.rmtree(staging, ignore_errors=True)
    result = HubProcess(DownloadJob(repo_id, LAST_CHECKPOINT, str(staging), revision)).result()
    if result.outcome == "missing":
        return None
    if result.outcome != "done":
        error = ValueError if result.outcome == "refused" else OSError
        raise error(f"The Hub does not give the {LAST_CHECKPOINT}/ of {repo_id}: {result.reason}.")
    fetched = staging / LAST_CHECKPOINT
    if defect := find_defect(fetched):
        shutil.rmtree(staging)
        raise ValueError(f"The {LAST_CHECKPOINT}/ of {result.repo_id} is not whole: {defect}.")
    step = json.loads((fetched / TRAINER_STATE_NAME).read_text()).get("global_step")
    if not isinstance(step, int) or step < 0:
        shutil.rmtree(staging)
        raise ValueError(
            f"The {LAST_CHECKPOINT}/ of {result.repo_id} is of step {step!r}, which is no number of steps."
        )
    listed = {*json.loads((fetched / MANIFEST_NAME).read_text())["files"], MANIFEST_NAME}
    for name in list(own_files(fetched)):
        if name not in listed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (fetched / name).replace(folder / name)
    final = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    publish(fetched, final)
    shutil.rmtree(staging)
    return final
