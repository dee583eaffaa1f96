"""What the site needs beyond the plug-ins of mkdocs: formulas, and docstrings in the form of Hugging Face."""

import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r"^\$\$\n(.*?)^\$\$$", re.DOTALL | re.MULTILINE)
_TYPE = re.compile(r"<code>([^<>]*`[^<>]*)</code>")
_REFERENCE = re.compile(r"\[<code>~?([\w.]+)</code>\]")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Turns display formulas, `$$` on lines of their own, into MathML, which browsers show without a script."""

    def mathml(found: re.Match[str]) -> str:
        return f'<div class="formula">{convert(found[1].strip(), display="block")}</div>'

    return _FORMULA.sub(mathml, markdown)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Takes the marks out of types such as "`Callable`, *optional*", and the brackets off references such as
    "[`~Trainer.train`]"."""
    html = _TYPE.sub(lambda found: f"<code>{re.sub('[`*~]|[[](?=`)|(?<=`)[]]', '', found[1])}</code>", html)
    return _REFERENCE.sub(lambda found: f"<code>{found[1].rpartition('.')[2]}</code>", html)
