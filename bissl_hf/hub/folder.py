"""Which files of a run lie on the Hub, and where.

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
from .process import DownloadJob, HubProcess

logger = logging.get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
# What the output folder holds beside is not pushed: it may be anything, or a card that gave way to the user's own.
_ROOT_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")
_FOLDERS = ("bilevel", "figures")
_FOLDER_SUFFIXES = (*_ROOT_SUFFIXES, ".png")
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
_LARGEST_TEXT_BYTES = 20_000_000


def outputs_of_run(output_dir: Path, *, except_for: Iterable[str] = ()) -> Iterator[tuple[Path, str]]:
    """Yields the files of an output folder that belong on the Hub, with their paths there, checkpoints left out."""
    for path in sorted(output_dir.iterdir()):
        if path.is_file() and (path.suffix in _ROOT_SUFFIXES or path.name == CARD_NAME):
            if path.name not in except_for and not path.name.startswith("."):
                yield path, path.name
        elif path.is_dir() and path.name in _FOLDERS:
            for file in sorted(path.rglob("*")):
                if file.is_file() and file.suffix in _FOLDER_SUFFIXES:
                    yield file, file.relative_to(output_dir).as_posix()


def files_of_checkpoint(checkpoint: Path, path_in_repo: str) -> Iterator[tuple[Path, str]]:
    """Yields the files of a whole checkpoint with their paths on the Hub."""
    for name in (*json.loads((checkpoint / MANIFEST_NAME).read_text())["files"], MANIFEST_NAME):
        yield checkpoint / name, f"{path_in_repo}/{name}"


def files_beside_checkpoint(output_dir: Path, names: Iterable[str], path_in_repo: str) -> Iterator[tuple[Path, str]]:
    """Yields the files of the output folder that a resume needs too: files by name, and folders with all they hold."""
    for name in names:
        root = output_dir / name
        for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
            if file.is_file():
                yield file, f"{path_in_repo}/{file.relative_to(output_dir).as_posix()}"


def lay_out(files: Iterable[tuple[Path, str]], tree: Path) -> None:
    """Puts files into a tree by their paths there, as hard links where the file system has them: they stay what they
    are when a run replaces or deletes its own. A file with a token in it is left out with a warning."""
    for source, path_in_repo in files:
        if holds_token(source):
            logger.warning(f"{source} holds a token of the Hub and is not pushed.")
            continue
        target = tree / path_in_repo
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            os.link(source, target)
        except OSError:  # another device, or a file system without links
            shutil.copy2(source, target)


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
    listed = {*json.loads((fetched / MANIFEST_NAME).read_text())["files"], MANIFEST_NAME}
    for file in [path for path in fetched.rglob("*") if path.is_file()]:
        name = file.relative_to(fetched).as_posix()
        if name not in listed:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            file.replace(folder / name)
    step = json.loads((fetched / TRAINER_STATE_NAME).read_text())["global_step"]
    final = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
    publish(fetched, final)
    shutil.rmtree(staging)
    return final
