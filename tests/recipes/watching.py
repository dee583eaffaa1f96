"""Which process of a recipe writes which file."""

import os
from collections import defaultdict
from pathlib import Path

from .runs import ROOT

# Imported by every process at its start: notes which files below a folder it opens for writing or renames.
_WATCH = """
import os, sys
folder, log = os.environ["WATCHED_FOLDER"], os.environ["WATCH_LOG"]
rank = os.environ.get("RANK")
noted = os.open(f"{log}-{rank}-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = arguments[0]
        if not isinstance(path, int) and os.path.isdir(path):
            return  # a file without a name, by which a folder is tried
    elif event == "os.rename":
        path = arguments[1]
    else:
        return
    if rank is not None and isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(folder):
        os.write(noted, f"{os.path.relpath(path, folder)}\\n".encode())
sys.addaudithook(note)
"""


def watched(folder: Path, notes: Path) -> dict[str, str]:
    """The environment in which the processes of a recipe note what they write below a folder."""
    notes.mkdir()
    (notes / "sitecustomize.py").write_text(_WATCH)
    paths = os.pathsep.join([str(notes), str(ROOT)])
    return {"PYTHONPATH": paths, "WATCHED_FOLDER": str(folder), "WATCH_LOG": str(notes / "log")}


def writers(notes: Path) -> dict[str, set[str]]:
    """The files, each with the ranks of the processes that wrote it."""
    found: dict[str, set[str]] = defaultdict(set)
    for log in notes.glob("log-*"):
        for path in log.read_text().splitlines():
            found[path].add(log.name.split("-")[1])
    return found
