"""Bad input as one sentence. Imports nothing of torch or transformers, so that `bissl-hf --help` answers at once."""

import difflib
import os
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

from ..text import for_terminal

EXIT_BAD_INPUT = 2
# How long a process waits for the first one of its machine to speak.
_FIRST_SPEAKS_SECONDS = 1.5


def refuse(message: str) -> NoReturn:
    """Ends the process with one sentence on stderr and the exit code for bad input.

    Of several processes any may find what is wrong, and mostly all do. The first of a machine speaks at once; its
    launcher then ends the others, which wait for that before they speak."""
    speak(message)
    sys.exit(EXIT_BAD_INPUT)


def speak(message: str) -> None:
    """Writes one sentence to stderr; a process that is not the first of its machine waits for that one before."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and (number := int(os.environ.get("LOCAL_RANK") or 0)) > 0:
        time.sleep(_FIRST_SPEAKS_SECONDS + number / 2)
    print(f"error: {for_terminal(' '.join(message.split()))}", file=sys.stderr, flush=True)


def close_matches(name: str, known: Iterable[str], otherwise: str = "; see --help for those that exist.") -> str:
    """Returns how to end a sentence on an unknown name: with known ones like it, or `otherwise` if there are none."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else otherwise


def show(text: str) -> None:
    """Prints a text, of which whoever reads it may take the beginning only, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain at its end
