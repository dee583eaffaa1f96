"""Commands of the documentation take the fields that pages give them, and one page has all fields."""

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bissl_hf.cli.main import COMMANDS

from .fields_page import PAGE, StopError, render
from .pages import PAGES, ROOT, blocks, name_of

RECIPES = {"bissl": "align", **{name: name for name in COMMANDS}}
_PLACEHOLDERS = ("COMMAND", "[")


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


def test_the_page_of_all_fields_is_that_of_the_package() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "docs/fields.md is out of date; run make fields"


def test_the_table_of_commands_has_all_of_them() -> None:
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert set(COMMANDS) <= set(re.findall(r"^\| \[?`(\w+)`", table, flags=re.MULTILINE))
