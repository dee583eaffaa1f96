"""Parts of a long run. Each has a folder of its own; one that is finished is found again and never run again."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..trainer.checkpoints import list_checkpoints, write_json

SETTINGS_NAME = "settings.json"
RESULT_NAME = "result.json"


class Part:
    """A part of a run.

    Args:
        folder (`str` or `os.PathLike`): its folder, created if need be.
        settings (`Mapping`): everything that its result depends on.
        writes (`bool`, *optional*, defaults to `True`): whether this process writes the files; one of them must.

    Raises:
        `ValueError`: if the folder holds a part that was begun with other settings.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], *, writes: bool = True) -> None:
        self.folder = Path(folder)
        self.writes = writes
        now = json.loads(json.dumps(settings, default=str))
        file = self.folder / SETTINGS_NAME
        if file.is_file():
            then = json.loads(file.read_text())
            names = sorted({*then, *now})
            changed = [
                f"{name} was {then.get(name)} and is {now.get(name)}"
                for name in names
                if then.get(name) != now.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{self.folder} was begun with other settings: {'; '.join(changed)}. Go on with the settings of "
                    "then, or choose another output_dir."
                )
        elif writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(file, now)

    @property
    def result(self) -> dict[str, Any] | None:
        """The result of the finished part; `None` if it is not finished."""
        file = self.folder / RESULT_NAME
        return json.loads(file.read_text()) if file.is_file() else None

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keeps the result, and lets the checkpoints go, which nothing needs any more.

        Returns:
            `dict`: the result, as a later start will read it.
        """
        if self.writes:
            write_json(self.folder / RESULT_NAME, result)
            for checkpoint in list_checkpoints(self.folder):
                shutil.rmtree(checkpoint)
        return json.loads(json.dumps(result))
