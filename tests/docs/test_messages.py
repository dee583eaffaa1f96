"""docs/troubleshooting.md has every warning of the package, and only messages that there are."""

import ast
import re
from pathlib import Path

import pytest

import bissl_hf

from .pages import ROOT

PACKAGE = Path(bissl_hf.__file__).parent
PAGE = ROOT / "docs" / "troubleshooting.md"


def template(node: ast.AST) -> str | None:
    """The text of a message, with an ellipsis for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sdrg]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) or "…" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return "…"
    if isinstance(node, ast.BinOp):
        return "".join(template(part) or "…" for part in (node.left, node.right))
    return None


def messages(package: Path) -> tuple[set[str], set[str]]:
    """The templates of warnings, and those of all texts in the package."""
    warned, every = set(), set()
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := template(node)) is not None:
                every.add(text)
            if not isinstance(node, ast.Call) or not node.args or (text := template(node.args[0])) is None:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in ("warn", "warning", "warning_once"):
                warned.add(text)
    return warned, every


def headings() -> dict[str, str]:
    """The messages of the page, with the section that each is in."""
    found, section = {}, ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("### `"):
            found[line.removeprefix("### `").removesuffix("`")] = section
    return found


def matches(heading: str, text: str) -> bool:
    """Whether a message has the text of a heading, in which `...` stands for what varies."""
    pattern = ".*".join(re.escape(part) for part in heading.split("..."))
    return re.match(pattern, text.replace("`", ""), re.DOTALL) is not None


WARNED, EVERY = messages(PACKAGE)


@pytest.mark.parametrize("text", sorted(text for text in WARNED if any(map(str.isalpha, text))))
def test_every_warning_is_explained(text: str) -> None:
    assert [heading for heading in headings() if matches(heading, text)]


@pytest.mark.parametrize("heading", list(headings()))
def test_every_message_of_the_page_is_one_of_the_package(heading: str) -> None:
    candidates = WARNED if headings()[heading].startswith("Warnings") else EVERY
    assert any(matches(heading, text) for text in candidates)


def test_values_of_messages_are_left_out() -> None:
    call = ast.parse("warn(f'a {x} b' + 'c %s d')").body[0].value  # type: ignore[attr-defined]
    assert template(call.args[0]) == "a … bc … d"
    assert matches("a ... bc", "a … bc … d")
    assert not matches("b ...", "a … bc … d")
