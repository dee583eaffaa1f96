"""Images from their files: whatever the mode, the EXIF data or the error of a decoder."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeVar

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

UNREADABLE_ADVICE = "Replace or remove what cannot be read, or leave it out: unreadable='skip'."

_PROGRESS_ROWS = 2000
_BLOCK_ROWS = 256
_ARROW_ROWS = 1024
# "cannot identify image file <_io.BytesIO object at 0x7f...>"
_OBJECT = re.compile(r"\s*<_io\.[^>]*>")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_MAX_8_BITS, _MAX_16_BITS = 255, 65535
_UPRIGHT = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class UnreadableImage:
    """An image that cannot be read.

    Args:
        row (`int`)
        path (`str`, *optional*): where it has one.
        reason (`str`, *optional*): what its decoder says; `None` if there is no image in the row.
    """

    row: int
    path: str | None
    reason: str | None

    @property
    def place(self) -> str:
        """Row and path."""
        if self.path is None:
            return f"row {self.row}"
        return f"row {self.row} ({self.path if self.path.isprintable() else ascii(self.path)})"


class UnreadableImagesError(ValueError):
    """Raised after all images have been tried, with all those that cannot be read.

    Args:
        images (`Sequence[UnreadableImage]`): at least one.
        total (`int`): how many images there are.
        split (`str`): their split.
    """

    def __init__(self, images: Sequence[UnreadableImage], total: int, split: str) -> None:
        self.rows = [image.row for image in images]
        self.description = describe_unreadable(images, total, split)
        super().__init__(f"{self.description} {UNREADABLE_ADVICE}")


def describe_unreadable(images: Sequence[UnreadableImage], total: int, split: str) -> str:
    """Returns a sentence that names every image, those of one reason together."""
    if len(images) == 1:
        (image,) = images
        where = image.place.replace(f"row {image.row}", f"row {image.row} of the split {split!r}", 1)
        if image.reason is None:
            return f"There is no image in {where}."
        return f"The image in {where} cannot be read: {image.reason}."
    by_reason: dict[str, list[str]] = {}
    for image in images:
        by_reason.setdefault(image.reason or "there is no image", []).append(image.place)
    told = "; ".join(f"{', '.join(places)}: {reason}" for reason, places in by_reason.items())
    return f"{len(images)} of {total} images of the split {split!r} cannot be read: {told}."


class ImageReader:
    """Reads the column `image` of a split: headers for sizes, or whole images as RGB.

    Args:
        dataset (`datasets.Dataset`): with a column `image`.
        split (`str`, *optional*): its name in messages. Defaults to what the data set says.
    """

    def __init__(self, dataset: datasets.Dataset, split: str | None = None) -> None:
        self._mode = replace(dataset.features["image"]).mode
        raw = dataset.with_format(None).select_columns(["image"])
        self._rows = raw.cast_column("image", datasets.Image(decode=False))
        self.split = split or str(dataset.split or "given")

    def __len__(self) -> int:
        return len(self._rows)

    def paths_of_files(self) -> Iterator[str]:
        """Yields the paths of images whose bytes are not in the table."""
        table = self._rows.with_format("arrow")
        for start in range(0, len(self), _ARROW_ROWS):
            images = table[start : start + _ARROW_ROWS]["image"].combine_chunks()
            paths = images.field("path").filter(images.field("bytes").is_null())
            yield from (path for path in paths.to_pylist() if path)

    def common_square_side(self) -> int | None:
        """Returns the side of the images if all that can be read are square and of one size, else `None`; reads the
        headers only."""
        side: int | None = None
        for start, block in self._blocks():
            for row, value in enumerate(block, start):
                size = self._try(row, value, _header_size)
                if isinstance(size, UnreadableImage):
                    continue
                if size[0] != size[1] or size[0] != (side or size[0]):
                    return None
                side = size[0]
        return side

    def map(self, function: Callable[[int, PIL.Image.Image], _T], description: str) -> Iterator[_T | UnreadableImage]:
        """Yields, in the order of the rows, what a function of row and RGB image returns, or what cannot be read."""
        scaled = {"fractions": 0, "deep": 0}

        def apply(row: int, value: dict[str, Any] | None) -> _T | UnreadableImage:
            image = self._try(row, value, self._decode)
            if isinstance(image, UnreadableImage):
                return image
            rgb, kind = image
            if kind is not None:
                scaled[kind] += 1
            return function(row, rgb)

        progress = tqdm(total=len(self), desc=description, unit="image", disable=len(self) <= _PROGRESS_ROWS)
        # Pillow decodes and resizes outside Python's global lock.
        with progress, ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            for start, block in self._blocks():
                yield from pool.map(apply, range(start, start + len(block)), block)
                progress.update(len(block))
        _tell_scaled(len(self), **scaled)

    def _blocks(self) -> Iterator[tuple[int, list[dict[str, Any] | None]]]:
        """Yields (first row number, undecoded rows)."""
        for start in range(0, len(self), _BLOCK_ROWS):
            yield start, self._rows[start : start + _BLOCK_ROWS]["image"]

    def _decode(self, file: IO[bytes]) -> tuple[PIL.Image.Image, str | None]:
        return decode_image(file, self._mode)

    def _try(self, row: int, value: dict[str, Any] | None, read: Callable[[IO[bytes]], _T]) -> _T | UnreadableImage:
        path = (value or {}).get("path")
        if value is None or (value.get("bytes") is None and not path):
            return UnreadableImage(row, None, None)
        try:
            with _open(value) as file:
                return read(file)
        except MemoryError:
            raise
        # Every decoder has errors of its own, from KeyError to struct.error.
        except Exception as error:
            return UnreadableImage(row, path, reason_of(error))


def decode_image(file: IO[bytes], mode: str | None = None) -> tuple[PIL.Image.Image, str | None]:
    """Returns the image of a file as training sees it: upright, in RGB; and how it was scaled, see [`to_rgb`].

    Args:
        file: opened for reading bytes.
        mode (`str`, *optional*): of Pillow, into which the image is converted first.

    Raises:
        `Exception`: whatever the decoder of its format raises; see [`reason_of`].
    """
    with PIL.Image.open(file) as opened:
        opened.load()
        image = _upright(opened)
        return to_rgb(image.convert(mode) if mode and image.mode != mode else image)


def reason_of(error: Exception) -> str:
    """Returns what a decoder says of an image that it cannot read, in one line."""
    return (_OBJECT.sub("", str(error)).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _open(value: dict[str, Any]) -> IO[bytes]:
    if value["bytes"] is not None:
        return BytesIO(value["bytes"])
    path = value["path"]
    if _URL.match(path):
        raise ValueError("it is an address, from which nothing is fetched; download the images first")
    return Path(path).open("rb")


def _header_size(file: IO[bytes]) -> tuple[int, int]:
    # The EXIF orientation may swap width and height, which does not matter for squares.
    with PIL.Image.open(file) as image:
        return image.size


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Returns the image as its EXIF orientation says. Damaged EXIF data are left aside, as every viewer does: unlike
    `PIL.ImageOps.exif_transpose` this never writes them anew, which fails on any odd entry."""
    try:
        orientation = image.getexif().get(PIL.ExifTags.Base.Orientation)
    # Whatever the parser makes of damaged data.
    except Exception as error:
        logger.debug(f"The EXIF data of an image cannot be read: {error}")
        return image
    if isinstance(orientation, tuple) and len(orientation) == 1:
        (orientation,) = orientation
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def to_rgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str | None]:
    """Returns an image of any mode as RGB with 8 bits per channel, and how its values were scaled, if they were:
    `fractions` are floats from 0 to 1, `deep` are values up to 65535.

    Raises:
        `ValueError`: if its values are not finite, negative or above that.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_to_rgb(image)
    if image.mode == "P" and "transparency" in image.info:
        # Straight to RGB, Pillow warns.
        image = image.convert("RGBA")
    elif image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    return image.convert("RGB"), None


def _deep_to_rgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str | None]:
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= _MAX_16_BITS):
        raise ValueError(
            f"its values reach from {low:g} to {high:g}, which may mean anything; convert it to 8 bits per channel"
        )
    kind = None
    if image.mode == "F" and high <= 1:
        values, kind = values * _MAX_8_BITS, "fractions"
    elif high > _MAX_8_BITS:
        values, kind = values * (_MAX_8_BITS / _MAX_16_BITS), "deep"
    return PIL.Image.fromarray(np.round(values).astype(np.uint8)).convert("RGB"), kind


def _tell_scaled(total: int, *, fractions: int, deep: int) -> None:
    if fractions:
        logger.warning(f"{fractions} of {total} images have float values from 0 to 1, which are taken times 255.")
    if deep:
        logger.warning(
            f"{deep} of {total} images have more than 8 bits per channel and are scaled to 8. Pipelines of "
            "`transformers` clip such images to white instead: convert them before the model is used there."
        )
