"""Values of arguments: what is refused, or put right, before a field takes them."""

import re
from argparse import Action
from typing import Any

from transformers.hf_argparser import string_to_bool

from ..data.paths import expand_path

_LIMIT = 2**63
_LONGEST_NUMBER = 40
_NUMBER = re.compile(r"[-+]?[0-9._eE+-]*[0-9][0-9._eE+-]*", re.ASCII)
# Of what reads as a number: 1_000 is one, and neither 010 (octal?) nor 2026_01_15 (a date?).
_PLAIN_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]*|[1-9][0-9]{0,2}(_[0-9]{3})+)?(\.[0-9]*)?([eE][-+]?[0-9]+)?", re.ASCII)
_PATH_FIELD = re.compile(r"(^|_)(dir|folder|file|path|dataset|model|backbone|checkpoint|input|output|image|config)s?$")
_SWITCHES = {"on": "true", "off": "false"}


def checked_value(action: Action, text: str) -> str:
    """Returns the text of an argument as its type shall read it.

    Args:
        action (`argparse.Action`): the argument.
        text (`str`): from the command line or a configuration.

    Raises:
        `ValueError`: if it is empty, or a number that can be read in more than one way, or is beyond 64 bits; or a
            path with a variable that is not set.
    """
    name, kind = action.dest, action.type
    if not text.strip():
        raise ValueError(
            f"{name} is empty, as a variable of a script is that was not set: give a value, or leave {name} out."
        )
    if kind is string_to_bool:
        return _SWITCHES.get(text.strip().lower(), text)
    if kind in (int, float):
        _check_number(name, kind, text.strip())
    elif _PATH_FIELD.search(name):
        return expand_path(text, field=name)
    return text


def _check_number(name: str, kind: Any, text: str) -> None:
    if len(text) > _LONGEST_NUMBER:
        raise ValueError(f"{name} is a text of {len(text)} characters ({text[:20]}...); it must be a number.")
    if text.lower().lstrip("+-") == "nan":
        raise ValueError(f"{name} is {text!r}; it must be a number.")
    if not text.isascii() or (_NUMBER.fullmatch(text) and not _PLAIN_NUMBER.fullmatch(text)):
        raise ValueError(
            f"{name} is {text!r}, which can be read in more than one way; write it in decimal digits, without leading "
            "zeros or underscores."
        )
    if kind is int and re.fullmatch(r"[-+]?[0-9_]+", text) and abs(int(text)) >= _LIMIT:
        raise ValueError(f"{name} is {text}; it must be below 2^63.")
