"""Which files are a folder's own: regular files inside it, reached through no symbolic link."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath


def is_inner_name(name: object) -> bool:
    """Whether a name is a relative path that cannot lead out of the folder it is joined to."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root:
        return False
    return bool(posix.parts) and ".." not in windows.parts


def is_own_file(root: str | os.PathLike[str], name: str) -> bool:
    """Whether `name` is a regular file inside `root`, where neither it nor a folder between them is a symbolic link.
    `root` itself may be reached through one."""
    if not is_inner_name(name):
        return False
    path = Path(root)
    try:
        for part in PurePosixPath(name).parts:
            path = path / part
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                return False
    except (OSError, ValueError):  # missing, no access, or a name that the system has no encoding for
        return False
    return stat.S_ISREG(mode)


def own_files(root: str | os.PathLike[str], folder: str = ".") -> Iterator[str]:
    """Yields the names, relative to `root`, of its own files under `folder`, sorted.

    Args:
        root (`str` or `os.PathLike`)
        folder (`str`, *optional*, defaults to `"."`): relative to `root`; all of it if not given. A file is yielded
            itself.
    """
    start = Path(root) / folder
    if is_own_file(root, folder):
        yield PurePosixPath(folder).as_posix()
        return
    for path in sorted(start.rglob("*")):
        name = path.relative_to(root).as_posix()
        if is_own_file(root, name):
            yield name
