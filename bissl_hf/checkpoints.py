"""Checkpoints that are whole or not there: written aside, listed in a manifest, renamed at the end.

What a resume needs beside Trainer's own files is kept by its owners, which register with the store of the run.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .paths import is_inner_name, is_own_file
from .text import for_terminal

MANIFEST_NAME = "manifest.json"
RUN_STATE_NAME = "run_state.json"
RUN_TENSORS_NAME = "run_tensors.safetensors"
_CHECKSUM = "xxh3_128"
_TIMES = re.compile("time|second")
# Trainer looks for folders called checkpoint-*; this name is none of them.
STAGING_FOLDER = ".unfinished"


class DamagedFileError(ValueError):
    """A file of a run does not hold what was written."""


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
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(content, indent=2, sort_keys=True))


def write_mapping(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes a mapping as [`write_json`] does, with a checksum by which [`read_mapping`] knows it again."""
    plain = json.loads(json.dumps(content))
    write_json(path, {**plain, _CHECKSUM: _checksum_of(plain)})


def read_mapping(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON file that holds a mapping, and compares its checksum if it has one.

    Raises:
        [`DamagedFileError`]: if it holds something else; with what to do.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        checksum = content.pop(_CHECKSUM, None)
        is_whole = isinstance(content, dict) and checksum in (None, _checksum_of(content))
    except (ValueError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise DamagedFileError(f"{path} is empty or damaged. Put a whole copy in its place, or move it away.")
    return content


def _checksum_of(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(_without_times(content), sort_keys=True).encode()).hexdigest()


def _without_times(content: Any) -> Any:
    """Leaves out what differs between two runs that are the same, whose files so have the same checksum."""
    if isinstance(content, list):
        return [_without_times(item) for item in content]
    if not isinstance(content, dict):
        return content
    return {name: _without_times(item) for name, item in content.items() if not _TIMES.search(name)}


def write_manifest(folder: str | os.PathLike[str]) -> None:
    """Lists the files of a finished checkpoint with their sizes in bytes and their checksums."""
    folder = Path(folder)
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST_NAME
    }
    write_json(folder / MANIFEST_NAME, {"files": files})


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_defect(folder: str | os.PathLike[str], *, contents: bool = True) -> str | None:
    """Returns what a checkpoint lacks, as a clause for a message, or `None` if it is whole.

    Args:
        folder (`str` or `os.PathLike`)
        contents (`bool`, *optional*, defaults to `True`): whether to read the files and compare their checksums, or to
            look at their sizes only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "it is not a folder"
    try:
        files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
        listed = [(str(name), int(entry["bytes"]), str(entry["xxh3_128"])) for name, entry in files.items()]
    except FileNotFoundError:
        return f"it has no {MANIFEST_NAME}, which is written last"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"its {MANIFEST_NAME} cannot be read"
    for name, size, checksum in listed:
        shown, path = for_terminal(name), folder / name
        if not is_inner_name(name):
            return f"its {MANIFEST_NAME} names {shown}, which is outside of it"
        if not path.is_file():
            return f"{shown} is missing"
        if not is_own_file(folder, name):
            return f"{shown} is reached through a symbolic link"
        if path.stat().st_size != size:
            return f"{shown} has {path.stat().st_size} bytes instead of {size}"
        if contents and _checksum(path) != checksum:
            return f"{shown} is damaged: its checksum is not that with which it was written"
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


def synchronise(folder: Path) -> None:
    """Waits until the files of a folder, and their names, are on the disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Moves a finished checkpoint, once it is on the disk, to its place, in which it replaces one of the same step."""
    synchronise(staged)
    if final.exists():
        outgoing = staged.with_name(f"{staged.name}.old")
        final.replace(outgoing)
        staged.replace(final)
        shutil.rmtree(outgoing)
    else:
        staged.replace(final)


def rotate_checkpoints(output_dir: str | os.PathLike[str], limit: int | None, *, keep: set[str]) -> None:
    """Removes the checkpoints of the lowest steps until `limit` are left. Steps decide, not times: a clock may be
    wrong, and a copied folder has new ones. The newest checkpoint always stays.

    Args:
        output_dir (`str` or `os.PathLike`): folder of a run.
        limit (`int`, *optional*): how many to keep; all if not given or below 1.
        keep (`set[str]`): names of checkpoints that stay whatever their step; they count.
    """
    checkpoints = list_checkpoints(output_dir)
    if limit is None or limit < 1:
        return
    removable = [path for path in checkpoints[:-1] if path.name not in keep]
    for path in removable[: max(0, len(checkpoints) - limit)]:
        shutil.rmtree(path)


class Stateful(Protocol):
    """What owns state that a resume needs: dictionaries of tensors and of what JSON can hold."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class CheckpointStore:
    """Writes and reads what a resume needs beside Trainer's own files."""

    def __init__(self) -> None:
        self._owners: dict[str, Stateful] = {}

    def register(self, name: str, owner: Stateful) -> None:
        """Adds an owner of state. Its state is read on every process, and that of the first one is written.

        Raises:
            `ValueError`: if the name is taken.
        """
        if name in self._owners:
            raise ValueError(f"An owner called {name!r} is registered already; choose another name.")
        self._owners[name] = owner

    @property
    def owners(self) -> list[str]:
        """Names of the owners."""
        return list(self._owners)

    def collect(self) -> dict[str, Any]:
        """Returns the state of all owners, by their names. Called on every process."""
        return {name: owner.state_dict() for name, owner in self._owners.items()}

    def write(self, folder: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
        """Writes a state that was collected, and the settings that a resumed run must share."""
        tensors: dict[str, Tensor] = {}
        content = _take_tensors(state, tensors, "")
        write_json(folder / RUN_STATE_NAME, {"settings": settings, "state": content})
        if tensors:
            save_file(tensors, folder / RUN_TENSORS_NAME)

    def load(self, folder: Path, device: torch.device) -> None:
        """Gives each owner its state back, tensors on a device."""
        state = read_run_state(folder)["state"]
        if (folder / RUN_TENSORS_NAME).is_file():
            # To the host first: among several processes a CPU is called "cpu:0", which safetensors does not know.
            for name, tensor in load_file(folder / RUN_TENSORS_NAME).items():
                *path, last = name.split("/")
                place = state
                for key in path:
                    place = place.setdefault(key, {})
                place[last] = tensor.to(device)
        for name, owner in self._owners.items():
            owner.load_state_dict(state[name])


def _take_tensors(state: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> dict[str, Any]:
    """Returns a state without its tensors, which are added to `tensors` under their paths."""
    content: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}{name}"] = value.detach().contiguous()
        elif isinstance(value, dict):
            content[name] = _take_tensors(value, tensors, f"{prefix}{name}/")
        else:
            content[name] = value
    return content


def read_run_state(checkpoint: Path, *, owners: Iterable[str] = ()) -> dict[str, Any]:
    """Returns what [`CheckpointStore`] wrote into a checkpoint beside the tensors.

    Args:
        checkpoint (`Path`)
        owners (`Iterable[str]`, *optional*): names whose state must be in it.

    Raises:
        [`DamagedFileError`]: if the file was changed into something else.
    """
    path = checkpoint / RUN_STATE_NAME
    try:
        content = json.loads(path.read_text())
        if isinstance(content["settings"], dict) and all(isinstance(content["state"][name], dict) for name in owners):
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedFileError(f"{path} cannot be read ({error}). Resume from another checkpoint.") from error
    raise DamagedFileError(f"{path} does not hold the state of a run. Resume from another checkpoint.")
