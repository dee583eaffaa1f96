"""Images that two splits have in common."""

import hashlib
import logging
from collections.abc import Iterator

import PIL.Image
from datasets import Dataset

from .reading import ImageReader, UnreadableImage

logger = logging.getLogger(__name__)


def drop_duplicates(split: Dataset, other: Dataset) -> Dataset:
    """Leaves out the images that are in another split too: those with the same pixels as RGB, whatever file they come
    from. Both splits are decoded once for it.

    Args:
        split (`Dataset`): with a column `image`.
        other (`Dataset`): likewise; what must not be in the first.

    Returns:
        `Dataset`: the rows of `split` that are left, in their order.
    """
    unwanted = set(_pixel_hashes(other))
    kept = [row for row, digest in enumerate(_pixel_hashes(split)) if digest is None or digest not in unwanted]
    logger.info(f"{len(split) - len(kept)} of {len(split)} images are exact duplicates and left out.")
    return split if len(kept) == len(split) else split.select(kept)


def _pixel_hashes(split: Dataset) -> Iterator[bytes | None]:
    """Yields what distinguishes the images, and `None` for one that cannot be read."""

    def digest(row: int, image: PIL.Image.Image) -> bytes:
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()

    for found in ImageReader(split).map(digest, "Looking for duplicates"):
        yield None if isinstance(found, UnreadableImage) else found
