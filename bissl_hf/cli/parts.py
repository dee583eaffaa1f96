"""Stages of a long run. Each has a folder of its own; one that is finished is found again and never run again."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints import list_checkpoints, read_mapping, write_mapping
from ..run_lock import LOCK_NAME

SETTINGS_NAME = "settings.json"
RESULT_NAME = "result.json"


class Stage:
    """A stage of a run with a folder of its own.

    Args:
        folder (`str` or `os.PathLike`): its folder.
        settings (`Mapping`): everything that its result depends on.
        writes (`bool`, *optional*, defaults to `True`): whether this process writes the files; one of them must.
        begins (`bool`, *optional*, defaults to `True`): whether to [`begin`] at once; else the folder is only looked
            at.

    Raises:
        `ValueError`: if the folder holds what a part with other settings has left, or its files are damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        writes: bool = True,
        begins: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings, default=str))
        self.writes = writes
        self._check_settings()
        if begins:
            self.begin()

    def _check_settings(self) -> None:
        file = self.folder / SETTINGS_NAME
        then, now = read_mapping(file) if file.is_file() else self.settings, self.settings
        changed = [
            f"{name} was {then.get(name)} and is {now.get(name)}"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name)
        ]
        if changed and self._left():
            raise ValueError(
                f"{self.folder} was begun with other settings: {'; '.join(changed)}. Go on with the settings of "
                "then, or choose another output_dir."
            )

    def _left(self) -> bool:
        """Whether there is anything that other settings would spoil."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return any(path.name not in (SETTINGS_NAME, f".{SETTINGS_NAME}.tmp", LOCK_NAME) for path in files)

    def begin(self) -> None:
        """Creates the folder and keeps the settings, with which alone the part can go on once it has left anything."""
        if self.writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_mapping(self.folder / SETTINGS_NAME, self.settings)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the finished part; `None` if it is not finished."""
        file = self.folder / RESULT_NAME
        return read_mapping(file) if file.is_file() else None

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps the result, and lets the checkpoints go, which nothing needs any more.

        Returns:
            `dict`: the result, as a later start will read it.
        """
        if self.writes:
            write_mapping(self.folder / RESULT_NAME, result)
            for checkpoint in list_checkpoints(self.folder):
                shutil.rmtree(checkpoint)
        return json.loads(json.dumps(result))
