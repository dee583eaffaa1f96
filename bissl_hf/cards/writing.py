"""README.md: a card that somebody has edited is never lost."""

import hashlib
import itertools
import re
from pathlib import Path

from huggingface_hub import ModelCard
from transformers.utils import logging

from ..checkpoints import write_text

logger = logging.get_logger(__name__)

CARD_NAME = "README.md"
_SEAL = (
    "\n<!-- This card was written by bissl_hf, which renews it at the end of a run. A card that was edited is left as "
    "it is. {checksum} -->\n"
)
_SEALED = re.compile(re.escape(_SEAL).replace(r"\{checksum\}", "([0-9a-f]{64})") + r"\Z")


def write_model_card(card: ModelCard, folder: Path) -> Path:
    """Writes a card as README.md. A card that is there is replaced if we wrote it and it has not been edited since;
    else it stays, and the new one is written beside it.

    Returns:
        `Path`: the file that was written.
    """
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    sealed = text + _SEAL.format(checksum=_checksum(text))
    others = (f"README.new-{number}.md" for number in itertools.count(1))
    path = next(folder / name for name in itertools.chain([CARD_NAME], others) if _may_be_replaced(folder / name))
    if path.name != CARD_NAME:
        logger.warning(
            f"{folder / CARD_NAME} was written or edited by hand and is left as it is; the card of this run is in "
            f"{path.name}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, sealed)
    return path


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _may_be_replaced(path: Path) -> bool:
    """Whether a file is not there, or is a card of ours as it was written."""
    if not path.exists():
        return True
    text = path.read_bytes().decode(errors="replace")
    seal = _SEALED.search(text)
    return seal is not None and seal[1] == _checksum(text[: seal.start()])
