"""Images that two splits have in common."""

import hashlib
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers.image_utils import load_image

logger = logging.getLogger(__name__)

_BLOCK_ROWS = 256
_PROGRESS_ROWS = 2000


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
    kept = [row for row, digest in enumerate(_pixel_hashes(split)) if digest not in unwanted]
    logger.info(f"{len(split) - len(kept)} of {len(split)} images are exact duplicates and left out.")
    return split if len(kept) == len(split) else split.select(kept)


def _pixel_hashes(split: Dataset) -> Iterator[bytes]:
    images = split.with_format(None).select_columns(["image"])

    def digest(image: Any) -> bytes:
        image = load_image(image)
        return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()

    progress = tqdm(
        total=len(images), desc="Looking for duplicates", unit="image", disable=len(images) <= _PROGRESS_ROWS
    )
    with progress, ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(images), _BLOCK_ROWS):
            block = images[start : start + _BLOCK_ROWS]["image"]
            yield from pool.map(digest, block)
            progress.update(len(block))
