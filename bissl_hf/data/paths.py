"""Paths as users write them, and the files of a folder that are read."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

# Files and folders that systems and tools leave behind. What starts with a dot is left out as well.
_LITTER = frozenset({"__MACOSX", "__pycache__", "Thumbs.db", "desktop.ini"})
# At the start of a part; a dollar inside a name may be one.
_VARIABLE = re.compile(r"(?:^|(?<=/))\$([A-Za-z_]\w*|\{[A-Za-z_]\w*\})")
_ENDINGS_TOLD = 6


def expand_path(path: str, *, field: str | None = None) -> str:
    """Returns a path with `~` and environment variables put in.

    Args:
        path (`str`): as a user wrote it.
        field (`str`, *optional*): the argument that it comes from, for messages.

    Raises:
        `ValueError`: if it names a variable that is not set, or a user who does not exist.
    """
    # A path that exists as it is written, such as a folder `$1`, is meant.
    if os.path.lexists(path):
        return path
    where = f"{field} is {path!r}" if field else f"The path is {path!r}"
    expanded = os.path.expandvars(path)
    if lacking := _VARIABLE.search(expanded):
        raise ValueError(f"{where}; the environment variable {lacking[0]} is not set: set it, or write the path out.")
    if expanded.startswith("~"):
        expanded = os.path.expanduser(expanded)
        if expanded.startswith("~"):
            raise ValueError(f"{where}; there is no user {expanded.split('/')[0]!r}: write the path out.")
    return expanded


def is_hidden(name: str) -> bool:
    """Whether a file or folder is of no interest by its name: hidden, or left behind by a system."""
    return name.startswith(".") or name in _LITTER


def is_special(path: Path, root: Path) -> bool:
    """Whether a file below a folder is in one whose name starts with two underscores, which `datasets` does not
    read."""
    return f"{os.sep}__" in os.path.dirname(str(path)[len(str(root)) :])


def walk_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the files in a folder and in those inside it, sorted by name within each, without hidden ones; links to
    folders `above`, which are resolved, are not followed."""
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    entries = [entry for entry in entries if not is_hidden(entry.name)]
    yield from (folder / entry.name for entry in entries if not entry.is_dir())
    resolved = folder.resolve()
    above = (*above, resolved, *resolved.parents)
    for entry in entries:
        if entry.is_dir() and not (entry.is_symlink() and (folder / entry.name).resolve() in above):
            yield from walk_files(folder / entry.name, above)


def parquet_files(folder: Path) -> list[Path]:
    """Returns the Parquet files in a folder, without hidden ones and those that describe images beside them."""
    return [
        path
        for path in walk_files(folder)
        if path.suffix.lower() == ".parquet" and path.name != "metadata.parquet" and not is_special(path, folder)
    ]


def count_endings(paths: Iterable[Path]) -> str:
    """Returns how many files there are and of which endings, such as `9 files (5 of .heic, 4 without an ending)`."""
    endings = Counter(_ending(path) for path in paths)
    told = [f"{count} {ending}" for ending, count in endings.most_common(_ENDINGS_TOLD)]
    if others := sum(endings.values()) - sum(count for _, count in endings.most_common(_ENDINGS_TOLD)):
        told.append(f"{others} of {len(endings) - _ENDINGS_TOLD} other endings")
    total = sum(endings.values())
    return f"{total} file{'s' if total != 1 else ''} ({', '.join(told)})"


def _ending(path: Path) -> str:
    # What a download left at a name ("a.png?w=640") differs from file to file.
    suffix, question, _ = path.suffix.partition("?")
    if question:
        return f"of {suffix}?..."
    name, question, _ = path.name.partition("?")
    if question and Path(name).suffix:
        return f"of {Path(name).suffix}?..."
    return f"of {suffix[:20].lower()}" if suffix else "without an ending"
