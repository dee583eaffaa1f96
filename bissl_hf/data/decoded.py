"""Images that are decoded once: one uint8 array in memory, or mapped from a file, read by row number.

Decoding PNG or JPEG files in every epoch is what starves a device first; reading rows of an array is a hundred times
faster.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
import xxhash

from .pixel_file import is_whole, map_pixels, read_rows, remember_rows, write_pixels
from .reading import ImageReader, UnreadableImage, UnreadableImagesError
from .schema import class_names, labels_of

logger = logging.getLogger(__name__)

# Decoding as much takes a second or two; a larger array is written to a file once.
MAX_BYTES_IN_MEMORY = 32 * 2**20
_LONGEST_ASPECT = 16
_ROWS_AT_ONCE = 8
UNREADABLE = ("stop", "skip")
# Raised whenever the same images would be stored differently, so that old cache files are not read.
_CACHE_VERSION = 2


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
    # The image processors cut at (length - image_size) // 2. The difference of the two offsets makes both crops agree
    # when the lengths are odd; it is between 0 and length - side.
    left, top = ((length - image_size) // 2 - (side - image_size) // 2 for length in (width, height))
    if long > _LONGEST_ASPECT * short:
        # Only the middle is resized: whole, an image of 60,000 x 1 pixels would have 700 million.
        scale_x, scale_y = image.width / width, image.height / height
        box = (left * scale_x, top * scale_y, (left + side) * scale_x, (top + side) * scale_y)
        return image.resize((side, side), resample=PIL.Image.Resampling.BICUBIC, box=box)
    image = image.resize((width, height), resample=PIL.Image.Resampling.BICUBIC)
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
        self._pixels = map_pixels(pixels) if isinstance(pixels, Path) else pixels
        self.labels = labels
        self.class_names = class_names
        self._checksum: str | None = None
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
        unreadable: str = "stop",
        split: str | None = None,
        description: str = "Decoding images",
    ) -> "DecodedImages":
        """Decodes every image of a split to RGB, once.

        Images are read as pipelines of `transformers` read them: the EXIF orientation is applied, and every mode
        becomes RGB by `PIL.Image.convert`, which drops transparency. Other than there, floats from 0 to 1 and values
        above 255 are scaled to 8 bits (logged as a warning), and EXIF data that cannot be read are left aside.

        Args:
            dataset (`datasets.Dataset`): split with a column of images and maybe one of labels, `label` or `labels`,
                as [`load_image_dataset`] or a tutorial makes it.
            image_size (`int`): side of the images that the model sees, in pixels. Images are stored as squares of
                side `resize_side(image_size)`.
            native_size (`bool`, *optional*, defaults to `False`): whether images that are all square and of one size
                keep that size. For training images, whose crops then lose nothing to a first resize.
            cache_dir (`str` or `os.PathLike`, *optional*): folder for arrays above 32 MiB, which are mapped from a
                file that later runs find again. Defaults to `bissl_hf` in the cache folder of `datasets`. The room
                on its disk is taken before the first image is decoded; a damaged file is made anew.
            unreadable (`str`, *optional*, defaults to `"stop"`): what happens to images that cannot be read: `"stop"`
                for an error, `"skip"` to leave them out with a warning. Both name all of them.
            split (`str`, *optional*): its name in messages. Defaults to what the data set says.
            description (`str`, *optional*): name of the progress bar, which is shown above 2,000 images.

        Returns:
            `DecodedImages`: the decoded split.

        Raises:
            `TypeError`: if `image_size` is no integer.
            `ValueError`: if `image_size` is below 2, `unreadable` is another word, the split is empty or has no
                column `image`, images cannot be read (under `"skip"`: none can), or the cache folder has no room or
                cannot be written.
        """
        resize_side(image_size)
        dataset = _with_usual_names(dataset)
        if len(dataset) == 0:
            raise ValueError("`dataset` is empty; it must have at least one image.")
        if unreadable not in UNREADABLE:
            raise ValueError(f"`unreadable` is {unreadable!r}; it must be one of {UNREADABLE}.")
        folder = Path(cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "bissl_hf")
        decode = partial(
            _pixels_of, image_size=image_size, native_size=native_size, folder=folder, split=split, text=description
        )
        if unreadable == "stop":
            return cls._labelled(decode(dataset), dataset)
        known = folder / f"{_cache_key(dataset, ImageReader(dataset))}-unreadable.json"
        try:
            rows = read_rows(known, len(dataset))
            if rows:
                logger.warning(f"{len(rows)} of {len(dataset)} images cannot be read and are left out.")
            rest = _without(dataset, rows)
            return cls._labelled(decode(rest), rest)
        except UnreadableImagesError as error:
            if len(error.rows) == len(dataset):
                raise
            logger.warning(f"Left out: {error.description}")
            rest = _without(dataset, error.rows)
            remember_rows(known, error.rows)
        return cls._labelled(decode(rest), rest)

    @classmethod
    def _labelled(cls, pixels: np.ndarray | Path, dataset: datasets.Dataset) -> "DecodedImages":
        if "label" not in dataset.column_names:
            return cls(pixels)
        feature = dataset.features["label"]
        if isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint")):
            return cls(pixels, np.asarray(dataset.with_format(None)[:]["label"], dtype=np.int64))
        if isinstance(feature, datasets.Value):
            raise ValueError(
                f"The labels are {feature}; they must be class labels or whole numbers: "
                "`dataset.class_encode_column('label')` numbers them."
            )
        return cls(pixels, labels_of(dataset), class_names(dataset))

    def select(self, rows: Sequence[int]) -> "DecodedImages":
        """Returns some of the rows, copied, in the given order."""
        chosen = np.asarray(rows, dtype=np.int64)
        labels = None if self.labels is None else self.labels[chosen]
        return DecodedImages(self._pixels[chosen], labels, self.class_names)

    def checksum(self) -> str:
        """Returns what tells these images and labels from others, once: of a large array some rows are read."""
        if self._checksum is None:
            self._checksum = self._compute_checksum()
        return self._checksum

    def _compute_checksum(self) -> str:
        rows = len(self._pixels)
        step = max(1, self._pixels.nbytes // MAX_BYTES_IN_MEMORY)
        digest = xxhash.xxh3_64(f"{self._pixels.shape}".encode())
        for start in range(0, rows, _ROWS_AT_ONCE * step):
            digest.update(np.ascontiguousarray(self._pixels[start : start + _ROWS_AT_ONCE]).data)
        if self.labels is not None:
            digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

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
            self._pixels = map_pixels(self._path)


def _with_usual_names(dataset: datasets.Dataset) -> datasets.Dataset:
    """Returns a split with its images in `image` and its labels, `label` or `labels`, in `label`.

    Raises:
        `ValueError`: if it has no column of images, or several without a usual name.
    """
    if "image" not in dataset.column_names:
        typed = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
        if len(typed) != 1:
            raise ValueError(f"`dataset` has the columns {dataset.column_names}; it must have a column 'image'.")
        dataset = dataset.rename_column(typed[0], "image")
    if "labels" in dataset.column_names and "label" not in dataset.column_names:
        dataset = dataset.rename_column("labels", "label")
    return dataset


def decoded_for(dataset: Any, transform: Any, *, labelled: bool = True, crops: bool = True) -> Any:
    """Returns a data set that a trainer can read: one of `datasets` with a column of images is decoded for the
    transform it goes through; any other, and one with a `with_transform` of its own, comes back as it is.

    Args:
        dataset: any data set, or `None`.
        transform (`Callable`, *optional*): a transform of this package tells the size by its `image_size`.
        labelled (`bool`, *optional*, defaults to `True`): whether to keep labels.
        crops (`bool`, *optional*, defaults to `True`): whether the transform crops, so that images keep their size
            where they are square and of one size.
    """
    size = getattr(transform, "image_size", None)
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom" or size is None:
        return dataset
    if not any(isinstance(feature, datasets.Image) for feature in dataset.features.values()):
        return dataset
    dataset = _with_usual_names(dataset)
    dataset = dataset if labelled else dataset.select_columns("image")
    return DecodedImages.from_dataset(dataset, image_size=size, native_size=crops)


def _without(dataset: datasets.Dataset, rows: Sequence[int]) -> datasets.Dataset:
    return dataset.select(np.setdiff1d(np.arange(len(dataset)), rows)) if rows else dataset


def _pixels_of(
    dataset: datasets.Dataset, *, image_size: int, native_size: bool, folder: Path, split: str | None, text: str
) -> np.ndarray | Path:
    """Returns the decoded images, or the file that holds them: found, or written now."""
    side = resize_side(image_size)
    reader = ImageReader(dataset, split)
    name = _cache_key(dataset, reader)
    # Found before a header is read: of images by the hundred thousand that alone takes many seconds.
    for stored in folder.glob(f"{name}-native-*.npy") if native_size else ():
        if is_whole(stored, len(reader)):
            return stored
    native_side = reader.common_square_side() if native_size else None
    convert = None if native_side else lambda image: resize_and_crop_square(image, image_size)
    shape = (len(reader), 3, native_side or side, native_side or side)
    if int(np.prod(shape)) <= MAX_BYTES_IN_MEMORY:
        pixels = np.empty(shape, dtype=np.uint8)
        _decode_into(pixels, reader, convert, text)
        return pixels
    path = folder / f"{name}-{'native' if native_side else image_size}-{shape[2]}.npy"
    if not is_whole(path, len(reader)):
        write_pixels(path, shape, lambda array: _decode_into(array, reader, convert, text))
    return path


def _decode_into(
    array: np.ndarray,
    reader: ImageReader,
    convert: Callable[[PIL.Image.Image], PIL.Image.Image] | None,
    description: str,
) -> None:
    """Fills `array` (rows, 3, height, width) with the decoded, converted images."""

    def store(row: int, image: PIL.Image.Image) -> None:
        array[row] = np.moveaxis(np.asarray(convert(image) if convert else image), -1, 0)

    failures = [found for found in reader.map(store, description) if isinstance(found, UnreadableImage)]
    if failures:
        raise UnreadableImagesError(failures, len(reader), reader.split)


def _cache_key(dataset: datasets.Dataset, reader: ImageReader) -> str:
    """Names the content of a split: its fingerprint, and size and time of change of files it refers to."""
    digest = hashlib.sha256(f"{_CACHE_VERSION} {dataset._fingerprint} {len(dataset)}".encode())
    for path in reader.paths_of_files():
        if os.path.isfile(path):
            status = os.stat(path)
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    return digest.hexdigest()[:32]
