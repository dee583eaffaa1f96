"""Commands of the documentation take the fields that pages give them, and pages describe all fields."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from bissl_hf.cli.main import COMMANDS

from .pages import PAGES, ROOT, blocks, name_of

RECIPES = {"bissl": "align", **{name: name for name in COMMANDS}}
_PLACEHOLDERS = ("COMMAND", "[")
_DESCRIPTIONS = ("commands.md", "arguments.md", "studies.md", "memory.md", "searches.md", "hub.md", "performance.md")


class StopError(Exception):
    """Ends a command once its arguments are there."""


def commands_of(page: Path) -> list[tuple[str, list[str]]]:
    """The commands of this package in a page, with their arguments."""
    found = []
    for block in blocks(page, "bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for place, word in enumerate(words):
                recipe = re.fullmatch(r"recipes/(\w+)\.py", word)
                if word == "bissl-hf":
                    found.append((words[place + 1], words[place + 2 :]))
                elif recipe and recipe[1] in RECIPES:
                    found.append((RECIPES[recipe[1]], words[place + 1 :]))
    return [(name, given) for name, given in found if not name.startswith(("-", *_PLACEHOLDERS))]


def parse(name: str, given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads arguments as the command does, and stops there."""
    module = importlib.import_module(f"bissl_hf.cli.{'align' if name == 'demo' else name}")
    parse_arguments = module.parse_arguments

    def stop(*args: Any, **kwargs: Any) -> None:
        raise StopError(parse_arguments(*args, **kwargs))

    monkeypatch.setattr(module, "parse_arguments", stop)
    command = importlib.import_module(f"bissl_hf.cli.{name}")
    with pytest.raises(StopError):
        command.main(given)


def without_own_files(given: list[str]) -> list[str]:
    """Arguments without a configuration that is the reader's."""
    if "--config" not in given:
        return given
    place = given.index("--config")
    own = not (ROOT / given[place + 1]).exists()
    return [*given[:place], *given[place + 2 :]] if own else given


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=name_of)
def test_commands_take_the_fields_of_a_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name, given in commands_of(page):
        assert name in COMMANDS, name
        if not {"--help", "-h"} & set(given):
            with monkeypatch.context() as patch:
                parse(name, without_own_files(given), patch)


def dataclasses_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The dataclasses that hold the fields of a command."""
    module = importlib.import_module(f"bissl_hf.cli.{name}")
    kinds: list[Any] = []

    def keep(dataclass_types: Any, *args: Any, **kwargs: Any) -> None:
        kinds.extend(dataclass_types)
        raise StopError

    monkeypatch.setattr(module, "parse_arguments", keep)
    with pytest.raises(StopError):
        module.main([])
    return kinds


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_every_field_of_a_command_is_described(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join((ROOT / "docs" / page).read_text(encoding="utf-8") for page in _DESCRIPTIONS)
    described = set(re.findall(r"`(?:--)?(\w+)(?:[ :=][^`]*)?`", text))
    upstream = {field.name for field in fields(TrainingArguments)}
    own = {field.name for kind in dataclasses_of(name, monkeypatch) for field in fields(kind) if field.init}
    assert sorted(own - upstream - described) == []


def test_the_table_of_commands_has_all_of_them() -> None:
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert set(COMMANDS) <= set(re.findall(r"^\| \[?`(\w+)`", table, flags=re.MULTILINE))
