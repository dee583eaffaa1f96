"""Makes docs/fields.md, the fields of all commands, from what `--help` says: `make fields`."""

import importlib
from argparse import SUPPRESS, Action
from typing import Any
from unittest.mock import patch

from transformers import HfArgumentParser

from bissl_hf.cli.help import group_fields
from bissl_hf.cli.main import COMMANDS

from .pages import ROOT

PAGE = ROOT / "docs" / "fields.md"
_HEAD = """# All fields of all commands

What `--help` says of each command, with the defaults; `make fields` makes this page from the package. A field is given
as `--field value`, or as `field: value` in a file for `--config`. `demo` takes the fields of `align`. `--help all` has
those of `transformers.TrainingArguments` too.
"""


class StopError(Exception):
    """Ends a command once its arguments are there."""


def dataclasses_of(name: str) -> list[Any]:
    """The dataclasses that hold the fields of a command."""
    module = importlib.import_module(f"bissl_hf.cli.{name}")
    kinds: list[Any] = []

    def keep(dataclass_types: Any, *args: Any, **kwargs: Any) -> None:
        kinds.extend(dataclass_types)
        raise StopError

    with patch.object(module, "parse_arguments", keep):
        try:
            module.main([])
        except StopError:
            return kinds
    raise AssertionError(f"{name} does not read its arguments by parse_arguments")


def default_of(action: Action) -> str:
    """The default of a field as it would be written, empty if there is none."""
    value = action.default
    if value is None or value is SUPPRESS or value == "" or action.required:
        return "required" if action.required else ""
    if isinstance(value, list | tuple):
        return f"`{' '.join(map(str, value))}`" if value else ""
    return f"`{str(value).lower() if isinstance(value, bool) else getattr(value, 'value', value)}`"


def rows_of(name: str) -> list[str]:
    """The tables of a command, one for each group of its fields."""
    kinds = dataclasses_of(name)
    actions: dict[str, Action] = {}
    for action in HfArgumentParser(kinds, add_help=False)._actions:
        actions.setdefault(action.dest, action)  # the second one of a switch is its opposite
    lines: list[str] = []
    for title, names in group_fields(kinds).items():
        lines += ["", f"**{title.capitalize()}**", "", "| field | default | meaning |", "|---|---|---|"]
        for field in names:
            text = " ".join(
                (actions[field].help or "").replace("%%", "%").replace("|", "\\|").replace("<", "&lt;").split()
            )
            lines.append(f"| `{field}` | {default_of(actions[field])} | {text} |".replace("|  |", "| |"))
    return lines


def render() -> str:
    """The whole page."""
    names = [name for name in COMMANDS if name != "demo"]
    return "\n".join([_HEAD.rstrip(), *(line for name in names for line in ("", f"## {name}", *rows_of(name))), ""])


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
