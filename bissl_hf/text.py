"""Text from outside (names of classes, files, folders and metrics) as it may be shown: one function per medium."""

import html
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Control and format characters, surrogates, line and paragraph separators. They move the cursor, hide or reverse text.
_UNSHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
# Joiners are part of the spelling of several scripts and have no effect on what stands beside them.
_JOINERS = "\u200c\u200d"
_MARKDOWN = re.compile(
    r"[\\`*\[\]~$!]"  # code, emphasis, links, images, strikethrough, mathematics
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word is no emphasis
    r"|(?<=:/)/"  # a bare URL becomes a link
    r"|(?<=\bwww)\."
    r"|@"  # a mention, or an address of mail
    r"|^\s*(?:[#+=-]|\d+(?=[.)](?:\s|$)))",  # a heading, a list, a rule
    re.IGNORECASE,
)


def for_terminal(text: object) -> str:
    """Returns text of one line without control characters or marks of direction; they are shown as escapes.

    Args:
        text (`object`): its `str` is shown.

    Example:

    ```python
    >>> for_terminal("cat\\x1b[2J")
    'cat\\\\x1b[2J'
    ```
    """
    return "".join(
        character if character in _JOINERS or unicodedata.category(character) not in _UNSHOWN else _escape(character)
        for character in str(text)
    )


def for_console(text: str) -> str:
    """Returns lines wrapped to the width of the terminal, at most 100 columns, without control characters."""
    width = min(shutil.get_terminal_size().columns, 100) - 1
    lines = (textwrap.fill(for_terminal(line), width, break_on_hyphens=False) for line in text.split("\n"))
    return "\n".join(lines)


def for_html(text: object) -> str:
    """Returns text that HTML shows as it is, in an element or an attribute."""
    return html.escape(for_terminal(text), quote=True)


def for_markdown(text: object) -> str:
    """Returns text that Markdown shows as it is: no HTML, link, image, emphasis or heading comes of it. In a table
    [`~cards.tables.markdown_table`] escapes the bars."""
    return html.escape(_MARKDOWN.sub(_with_backslash, for_terminal(text)), quote=False)


def markdown_code(text: object) -> str:
    """Returns text as code in Markdown, where nothing but a backtick has a meaning; those become apostrophes."""
    return f"`{for_terminal(text).replace('`', chr(39))}`"


def _with_backslash(match: re.Match[str]) -> str:
    found = match[0]
    if found[-1].isdigit():
        return found + "\\"  # "1\." is no list
    return f"{found[:-1]}\\{found[-1]}"


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays rows out as a table of text, one column per key; no text for no rows. Cells are for the terminal."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [
        [for_terminal(cell) for cell in row] for row in (columns, *([row[name] for name in columns] for row in rows))
    ]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
