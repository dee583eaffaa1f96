"""The pages of the documentation and the blocks of code in them."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
_FENCE = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+?) -->\n\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """Code of a page.

    Args:
        page (`str`): path in the repository.
        line (`int`): of its first line of code, from 1.
        language (`str`): what stands behind the fence.
        code (`str`)
        reason (`str`, *optional*): why it is not run.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a page in a language, in their order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(name_of(page), text.count("\n", 0, found.start("code")) + 1, language, found["code"], found["reason"])
        for found in _FENCE.finditer(text)
        if found["language"] == language
    ]


def without_code(text: str) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", text)
