"""Checkpoints that are whole or not there: written aside, listed in a manifest, renamed at the end."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .paths import is_inner_name, is_own_file
from .text import for_terminal

MANIFEST_NAME = "manifest.json"
# Trainer looks for folders called checkpoint-*; this name is none of them.
STAGING_FOLDER = ".unfinished"


def write_text(path: str | os.PathLike[str], content: str) -> None:
    """Writes a text file that is either the old one or the new one, whatever happens meanwhile."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes a JSON file likewise."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True))


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Lists the files of a finished checkpoint with their sizes in bytes."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    write_json(folder / MANIFEST_NAME, {"files": files})


def find_defect(folder: str | os.PathLike[str]) -> str | None:
    """Returns what a checkpoint lacks, as a clause for a message, or `None` if it is whole."""
    folder = Path(folder)
    if not folder.is_dir():
        return "it is not a folder"
    try:
        files = dict(json.loads((folder / MANIFEST_NAME).read_text())["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, which is written last"
    except (KeyError, TypeError, ValueError):
        return f"its {MANIFEST_NAME} cannot be read"
    for name, size in files.items():
        shown = for_terminal(name)
        if not is_inner_name(name):
            return f"its {MANIFEST_NAME} names {shown}, which is outside of it"
        path = folder / name
        if not path.is_file():
            return f"{shown} is missing"
        if not is_own_file(folder, name):
            return f"{shown} is reached through a symbolic link"
        if path.stat().st_size != size:
            return f"{shown} has {path.stat().st_size} bytes instead of {size}"
    return None


def list_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Returns the folders called `checkpoint-N` in a run's folder, whole or not, by ascending N."""
    pattern = re.compile(rf"^{PREFIX_CHECKPOINT_DIR}-(\d+)$")
    if not Path(output_dir).is_dir():
        return []
    found = [(int(match[1]), path) for path in Path(output_dir).iterdir() if (match := pattern.match(path.name))]
    return [path for _, path in sorted(found)]


def find_last_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, dict[Path, str]]:
    """Finds the newest whole checkpoint of a run.

    Returns:
        `tuple[Path | None, dict[Path, str]]`: the checkpoint, and the newer ones passed over with what they lack.
    """
    passed_over: dict[Path, str] = {}
    for checkpoint in reversed(list_checkpoints(output_dir)):
        defect = find_defect(checkpoint)
        if defect is None:
            return checkpoint, passed_over
        passed_over[checkpoint] = defect
    return None, passed_over


def publish(staged: Path, final: Path) -> None:
    """Moves a finished checkpoint to its place; one of the same step that lies there already gives way."""
    if final.exists():
        outgoing = staged.with_name(f"{staged.name}.old")
        final.replace(outgoing)
        staged.replace(final)
        shutil.rmtree(outgoing)
    else:
        staged.replace(final)
