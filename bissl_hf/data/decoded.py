"""Images that are decoded once: one uint8 array in memory, or mapped from a file, read by row number.

Decoding PNG or JPEG files in every epoch is what starves a device first; reading rows of an array is a hundred times
faster.
"""

import hashlib
import logging
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm
from transformers.image_utils import load_image

from .schema import class_names, labels_of

logger = logging.getLogger(__name__)

# Decoding as much takes a second or two; a larger array is written to a file once.
MAX_BYTES_IN_MEMORY = 32 * 2**20
_PROGRESS_ROWS = 2000
_BLOCK_ROWS = 256
_ARROW_ROWS = 1024
# Raised whenever the same images would be stored differently, so that old cache files are not read.
_CACHE_VERSION = 1


def resize_side(image_size: int) -> int:
    """Returns the short side to which images are resized before the centre crop: `image_size * 256 / 224`.

    Raises:
        `TypeError`: if `image_size` is no integer.
        `ValueError`: if `image_size` is below 2.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int):
        raise TypeError(f"`image_size` is {image_size!r}; it must be an integer number of pixels.")
    if image_size < 2:
        raise ValueError(f"`image_size` is {image_size}; it must be at least 2 pixels.")
    return image_size * 256 // 224


def resize_and_crop_square(image: PIL.Image.Image, image_size: int) -> PIL.Image.Image:
    """Resizes the short side to `resize_side(image_size)` (bicubic) and cuts a square of that side from the middle.

    A centre crop of `image_size` from this square holds the same pixels as one from the whole resized image, which is
    what image processors of `transformers` return.

    Args:
        image (`PIL.Image.Image`): RGB image of any size.
        image_size (`int`): side of the later centre crop, in pixels.

    Returns:
        `PIL.Image.Image`: square image of side `resize_side(image_size)`.
    """
    side = resize_side(image_size)
    short, long = sorted(image.size)
    # Truncated, as in `transformers.image_transforms.get_resize_output_image_size`.
    width, height = (side if length == short else int(side * long / short) for length in image.size)
    image = image.resize((width, height), resample=PIL.Image.Resampling.BICUBIC)
    # The image processors cut at (length - image_size) // 2. The difference of the two offsets makes both crops agree
    # when the lengths are odd; it lies between 0 and length - side.
    left, top = ((length - image_size) // 2 - (side - image_size) // 2 for length in (width, height))
    return image.crop((left, top, left + side, top + side))


class DecodedImages(torch.utils.data.Dataset):
    """A split whose images are stored as one uint8 array of shape (rows, 3, height, width), with its labels.

    Build it with [`DecodedImages.from_dataset`]. An example is a dict with `pixel_values`, a uint8 tensor of shape
    (3, height, width), and `labels`: an `int`, or, where an image may have several classes, a float32 tensor of zeros
    and ones of shape (classes,). A split without labels has no `labels`.

    Args:
        pixels (`np.ndarray` or `Path`): the array, or the `.npy` file that holds it.
        labels (`np.ndarray`, *optional*): class numbers, int64, shape (rows,); or multi-hot, float32, shape (rows,
            classes).
        class_names (`list[str]`, *optional*): name of each class.

    Raises:
        `ValueError`: if the array is not uint8 of shape (rows, 3, height, width), or the labels are not one per row.

    Example:

    ```python
    >>> from bissl_hf.data.decoded import DecodedImages
    >>> from bissl_hf.data.sources import load_image_dataset
    >>> images = DecodedImages.from_dataset(load_image_dataset("digits")["test"], image_size=8, native_size=True)
    >>> images[0]["pixel_values"].shape
    torch.Size([3, 8, 8])
    ```
    """

    def __init__(
        self, pixels: np.ndarray | Path, labels: np.ndarray | None = None, class_names: list[str] | None = None
    ) -> None:
        self._path = pixels if isinstance(pixels, Path) else None
        self._pixels = _map_file(pixels) if isinstance(pixels, Path) else pixels
        self.labels = labels
        self.class_names = class_names
        if self._pixels.dtype != np.uint8 or self._pixels.ndim != 4 or self._pixels.shape[1] != 3:
            raise ValueError(
                f"`pixels` is {self._pixels.dtype} of shape {self._pixels.shape}; it must be uint8 of shape (rows, 3, "
                "height, width)."
            )
        if labels is not None and (labels.ndim not in (1, 2) or len(labels) != len(self._pixels)):
            raise ValueError(
                f"`labels` has the shape {labels.shape}; it must be ({len(self._pixels)},) or "
                f"({len(self._pixels)}, classes)."
            )

    @classmethod
    def from_dataset(
        cls,
        dataset: datasets.Dataset,
        *,
        image_size: int,
        native_size: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        description: str = "Decoding images",
    ) -> "DecodedImages":
        """Decodes every image of a split to RGB, once.

        Images are read as pipelines of `transformers` read them: the EXIF orientation is applied, and every mode
        becomes RGB by `PIL.Image.convert`, which drops transparency and clips values above 255 (logged as a warning).

        Args:
            dataset (`datasets.Dataset`): split with a column `image` and maybe `label`, as
                [`load_image_dataset`] returns it.
            image_size (`int`): side of the images that the model sees, in pixels. Images are stored as squares of
                side `resize_side(image_size)`.
            native_size (`bool`, *optional*, defaults to `False`): whether images that are all square and of one size
                keep that size. For training images, whose crops then lose nothing to a first resize.
            cache_dir (`str` or `os.PathLike`, *optional*): folder for arrays above 32 MiB, which are mapped from a
                file that later runs find again. Defaults to `bissl_hf` in the cache folder of `datasets`.
            description (`str`, *optional*): name of the progress bar, which is shown above 2,000 images.

        Returns:
            `DecodedImages`: the decoded split.

        Raises:
            `TypeError`: if `image_size` is no integer.
            `ValueError`: if `image_size` is below 2, the split is empty or has no column `image`, or an image cannot
                be read.
        """
        side = resize_side(image_size)
        if "image" not in dataset.column_names:
            raise ValueError(f"`dataset` has the columns {dataset.column_names}; it must have a column 'image'.")
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty; it must have at least one image.")
        reader = _ImageReader(dataset)
        folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "bissl_hf")
        name = _cache_key(dataset, reader)
        # Found before a header is read: of images by the hundred thousand that alone takes many seconds.
        stored = next(folder.glob(f"{name}-native-*.npy"), None) if native_size else None
        if stored is not None:
            return cls._labelled(stored, dataset)
        native_side = reader.common_square_side() if native_size else None
        convert = None if native_side else lambda image: resize_and_crop_square(image, image_size)
        shape = (len(reader), 3, native_side or side, native_side or side)
        pixels: np.ndarray | Path
        if int(np.prod(shape)) <= MAX_BYTES_IN_MEMORY:
            pixels = np.empty(shape, dtype=np.uint8)
            reader.decode_into(pixels, convert, description)
        else:
            pixels = folder / f"{name}-{'native' if native_side else image_size}-{shape[2]}.npy"
            if not pixels.exists():
                _write_file(pixels, shape, lambda array: reader.decode_into(array, convert, description))
        return cls._labelled(pixels, dataset)

    @classmethod
    def _labelled(cls, pixels: np.ndarray | Path, dataset: datasets.Dataset) -> "DecodedImages":
        if "label" not in dataset.column_names:
            return cls(pixels)
        return cls(pixels, labels_of(dataset), class_names(dataset))

    def select(self, rows: Sequence[int]) -> "DecodedImages":
        """Returns some of the rows, copied, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return DecodedImages(self._pixels[chosen], labels, self.class_names)

    def __len__(self) -> int:
        return len(self._pixels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape of one stored image: (3, height, width)."""
        return self._pixels.shape[1:]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        # Indexing with a list copies, so the tensors can be written to although a mapped file cannot.
        pixels = torch.from_numpy(self._pixels[np.asarray(indices, dtype=np.int64)])
        if self.labels is None:
            return [{"pixel_values": image} for image in pixels]
        labels: Any = self.labels[np.asarray(indices, dtype=np.int64)]
        labels = labels.tolist() if labels.ndim == 1 else torch.from_numpy(labels)
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with its content; a worker process maps the file again.
        state = self.__dict__.copy()
        if self._path is not None:
            del state["_pixels"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._path is not None:
            self._pixels = _map_file(self._path)


class _ImageReader:
    """Reads the column `image` of a split: headers for sizes, or whole images as RGB."""

    def __init__(self, dataset: datasets.Dataset) -> None:
        self._feature = replace(dataset.features["image"], decode=True)
        raw = dataset.with_format(None).select_columns(["image"])
        self._rows = raw.cast_column("image", datasets.Image(decode=False))
        self._split = dataset.split

    def __len__(self) -> int:
        return len(self._rows)

    def blocks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yields (first row number, undecoded rows)."""
        for start in range(0, len(self), _BLOCK_ROWS):
            yield start, self._rows[start : start + _BLOCK_ROWS]["image"]

    def paths_of_files(self) -> Iterator[str]:
        """Yields the paths of images whose bytes are not in the table."""
        table = self._rows.with_format("arrow")
        for start in range(0, len(self), _ARROW_ROWS):
            images = table[start : start + _ARROW_ROWS]["image"].combine_chunks()
            paths = images.field("path").filter(images.field("bytes").is_null())
            yield from (path for path in paths.to_pylist() if path)

    def common_square_side(self) -> int | None:
        """Returns the side of the images if all are square and of one size, else `None`; reads the headers only."""
        side: int | None = None
        for start, block in self.blocks():
            for row, value in enumerate(block, start):
                width, height = self._guard(row, value, _header_size)
                if width != height or width != (side or width):
                    return None
                side = width
        return side

    def decode_into(
        self, array: np.ndarray, convert: Callable[[PIL.Image.Image], PIL.Image.Image] | None, description: str
    ) -> None:
        """Fills `array` (rows, 3, height, width) with the decoded, converted images."""

        def decode(row: int, value: dict[str, Any]) -> bool:
            image = self._guard(row, value, self._decode)
            clipped = image.mode in ("I", "F") or image.mode.startswith("I;16")
            clipped = clipped and image.getextrema()[1] > 255
            image = load_image(image)
            array[row] = np.moveaxis(np.asarray(convert(image) if convert else image), -1, 0)
            return clipped

        num_clipped = 0
        progress = tqdm(total=len(self), desc=description, unit="image", disable=len(self) <= _PROGRESS_ROWS)
        # Pillow decodes and resizes outside Python's global lock.
        with progress, ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
            for start, block in self.blocks():
                num_clipped += sum(pool.map(decode, range(start, start + len(block)), block))
                progress.update(len(block))
        if num_clipped:
            logger.warning(
                f"{num_clipped} of {len(self)} images have more than 8 bits per channel and values above 255, which "
                "are clipped to white, as in pipelines of `transformers`. Convert them to 8 bits first."
            )

    def _decode(self, value: dict[str, Any]) -> PIL.Image.Image:
        # Read here, because a file that `datasets` opens stays open when its content is broken.
        if value["bytes"] is None and os.path.isfile(value["path"]):
            value = {**value, "bytes": Path(value["path"]).read_bytes()}
        return self._feature.decode_example(value)

    def _guard(self, row: int, value: dict[str, Any] | None, read: Callable[[dict[str, Any]], Any]) -> Any:
        path = (value or {}).get("path")
        where = f"row {row} of the split {str(self._split or 'given')!r}" + (f" ({path})" if path else "")
        if value is None:
            raise ValueError(f"There is no image in {where}. Remove the row.")
        try:
            return read(value)
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"The image in {where} cannot be read: {error}. Replace or remove it.") from error


def _header_size(value: dict[str, Any]) -> tuple[int, int]:
    # The EXIF orientation may swap width and height, which does not matter for squares.
    with PIL.Image.open(value["path"] if value["bytes"] is None else BytesIO(value["bytes"])) as image:
        return image.size


def _cache_key(dataset: datasets.Dataset, reader: _ImageReader) -> str:
    """Names the content of a split: its fingerprint, and size and time of change of files it refers to."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {dataset._fingerprint} {len(dataset)}".encode())
    for path in reader.paths_of_files():
        if os.path.isfile(path):
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]


def _write_file(path: Path, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]) -> None:
    """Writes an array file that appears under its name only when it is whole, whatever else is writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="incomplete-") as folder:
        partial = Path(folder) / path.name
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        fill(array)
        array.flush()
        os.replace(partial, path)


def _map_file(path: Path) -> np.ndarray:
    return np.asarray(np.lib.format.open_memmap(path, mode="r"))
