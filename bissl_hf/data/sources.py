"""Labelled image data sets by name, brought to one schema."""

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from datasets.utils.logging import get_logger

logger = get_logger(__name__)

IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
LABELLED_SPLITS = ("train", "validation", "test")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})


def _load_digits() -> DatasetDict:
    """The 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn; levels 0 to 16 become 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = [str(name) for name in digits.target_names]
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    rows = {"image": [_as_pil(image) for image in images], "label": digits.target.tolist()}
    return DatasetDict(train=Dataset.from_dict(rows, features=features))


def _as_pil(image: np.ndarray) -> Any:
    import PIL.Image

    return PIL.Image.fromarray(image)


# Data sets that are loaded by a bare name.
_NAMED: dict[str, Callable[[], DatasetDict]] = {"digits": _load_digits}


def load_image_dataset(
    name: str,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
    revision: str | None = None,
    **load_kwargs: Any,
) -> DatasetDict:
    """Loads images with labels under one schema: columns `image` and `label` (a `ClassLabel`), splits `train`,
    `validation` and `test`, and `unlabeled` (`image` only) where the source has one. A test or validation split that is
    missing is carved out of the training one, stratified and seeded.

    Args:
        name (`str`): `"digits"`, a folder of images (a folder per class, maybe below one per split), a Parquet file, a
            folder of Parquet files, or a data set on the Hub.
        image_column, label_column (`str`, *optional*): names of the columns; usual ones are found by themselves.
        validation_fraction, test_fraction (`float`, *optional*, defaults to 0.1 and 0.2): share of the training split
            that a missing split takes.
        seed (`int`, *optional*, defaults to 0): of the division.
        revision (`str`, *optional*): revision of a data set on the Hub.
        **load_kwargs: further arguments of `datasets.load_dataset` for a data set on the Hub.

    Returns:
        `datasets.DatasetDict`

    Raises:
        `ValueError`: if the name is not known, a column or all labels are missing, a split is empty, or a label is out
            of range.
        `ConnectionError`: if the Hub cannot be reached.

    Example:

    ```python
    >>> from bissl_hf import load_image_dataset
    >>> load_image_dataset("digits")["train"].column_names
    ['image', 'label']
    ```
    """
    for field, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 < fraction < 1:
            raise ValueError(f"{field} is {fraction}; it must lie between 0 and 1.")
    splits = _rename_splits(_load(name, revision, load_kwargs), name)
    unlabeled = splits.pop("unlabeled", None)
    for split, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(f"The split {split!r} of {name} is empty.")
    columns = splits["train"].column_names
    image = _find_column("image", image_column, IMAGE_COLUMNS, columns, name)
    label = _find_column("label", label_column, LABEL_COLUMNS, columns, name)
    splits = {split: _select(rows, {image: "image", label: "label"}, split, name) for split, rows in splits.items()}
    labelled = _with_class_labels(splits, name)
    for missing, fraction in (("test", test_fraction), ("validation", validation_fraction)):
        if missing not in labelled:
            logger.info(f"{name} has no {missing} split; {fraction:.0%} of the training split are set aside.")
            labelled["train"], labelled[missing] = _carve(labelled["train"], fraction, seed, name)
    result = DatasetDict({split: labelled[split] for split in LABELLED_SPLITS})
    if unlabeled is not None and len(unlabeled):
        result["unlabeled"] = _select(unlabeled, {image: "image"}, "unlabeled", name)
    return result


def _load(name: str, revision: str | None, load_kwargs: dict[str, Any]) -> DatasetDict:
    path = Path(name).expanduser()
    if name in _NAMED:
        return _NAMED[name]()
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{name} is a file but no Parquet file; pass one that ends in .parquet, or a folder.")
        return DatasetDict(train=Dataset.from_parquet(str(path)))
    if path.is_dir():
        return _load_folder(path)
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _load_from_hub(name, revision, load_kwargs)
    near = difflib.get_close_matches(name, _NAMED, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise ValueError(
        f"There is no data set {name!r}: it is no existing folder or file, no Hub id (user/name), and none of the "
        "known names "
        f"({', '.join(_NAMED)}){hint}"
    )


def _load_folder(path: Path) -> DatasetDict:
    parquet = sorted(path.rglob("*.parquet"))
    if parquet:
        files: dict[str, list[str]] = {}
        for file in parquet:
            files.setdefault(_split_of(file.stem.split("-")[0]) or _split_of(file.parent.name) or "train", []).append(
                str(file)
            )
        return DatasetDict({split: Dataset.from_parquet(paths) for split, paths in files.items()})
    split_folders = {
        split: child for child in sorted(path.iterdir()) if child.is_dir() and (split := _split_of(child.name))
    }
    folders = split_folders if "train" in split_folders else {"train": path}
    return DatasetDict({split: _images_below(folder) for split, folder in folders.items()})


def _images_below(folder: Path) -> Dataset:
    """Reads a folder with a folder of images per class; images that lie in no such folder have no label."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise ValueError(
            f"The folder {folder} holds no images (looked for {', '.join(sorted(_IMAGE_SUFFIXES))}) and no Parquet "
            "file."
        )
    rows: dict[str, list[Any]] = {"image": [str(file) for file in files]}
    if all(file.parent != folder for file in files):
        rows["label"] = [file.relative_to(folder).parts[0] for file in files]
    return Dataset.from_dict(rows).cast_column("image", Image())


def _load_from_hub(name: str, revision: str | None, load_kwargs: dict[str, Any]) -> DatasetDict:
    try:
        loaded = datasets.load_dataset(name, revision=revision, **load_kwargs)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(f"The Hub has no data set {name!r} that you may read: {error}") from error
    except (ConnectionError, OSError) as error:
        raise ConnectionError(f"The data set {name!r} could not be loaded from the Hub: {error}") from error
    if not isinstance(loaded, DatasetDict):
        raise ValueError(f"{name} was loaded as a {type(loaded).__name__}; leave `split` and `streaming` out.")
    return loaded


def _split_of(name: str) -> str | None:
    return next((split for split, names in _SPLIT_NAMES.items() if name.lower() in names), None)


def _rename_splits(splits: DatasetDict, name: str) -> dict[str, Dataset]:
    renamed = {split: rows for found, rows in splits.items() if (split := _split_of(str(found)))}
    if "train" not in renamed:
        raise ValueError(f"{name} has no training split; it has {', '.join(map(str, splits)) or 'none'}.")
    return renamed


def _find_column(kind: str, given: str | None, usual: Sequence[str], columns: Sequence[str], name: str) -> str:
    if given is not None:
        if given not in columns:
            raise ValueError(f"{kind}_column is {given!r}, and {name} has the columns {', '.join(columns)}.")
        return given
    found = next((column for column in usual if column in columns), None)
    if found is None:
        raise ValueError(
            f"{name} has no column of {kind}s under a usual name; it has the columns {', '.join(columns)}. "
            f"Name it in {kind}_column."
        )
    return found


def _select(rows: Dataset, columns: dict[str, str], split: str, name: str) -> Dataset:
    for column in columns:
        if column not in rows.column_names:
            raise ValueError(
                f"The split {split!r} of {name} has no column {column!r}; it has {', '.join(rows.column_names)}."
            )
    rows = rows.select_columns(list(columns))
    rows = rows.rename_columns({old: new for old, new in columns.items() if old != new})
    # Images are decoded later, once; a file or bytes that is no image is found there.
    return rows if isinstance(rows.features["image"], Image) else rows.cast_column("image", Image())


def _with_class_labels(splits: dict[str, Dataset], name: str) -> dict[str, Dataset]:
    """Gives every split the same `ClassLabel`, and checks each label against it."""
    feature = splits["train"].features["label"]
    values = {split: list(rows["label"]) for split, rows in splits.items()}
    for split, labels in values.items():
        for row, label in enumerate(labels):
            if label is None or label == "":
                raise ValueError(f"Row {row} of the split {split!r} of {name} has no label.")
    if isinstance(feature, ClassLabel):
        names = feature.names
    elif all(isinstance(label, str) for label in values["train"]):
        names = sorted(set(values["train"]))
    elif all(isinstance(label, int) for label in values["train"]):
        names = [str(number) for number in range(max(values["train"]) + 1)]
    else:
        raise ValueError(
            f"The labels of {name} are {type(values['train'][0]).__name__}; they must be class numbers or names."
        )
    if len(names) < 2:
        raise ValueError(f"{name} has {len(names)} class; a classifier needs at least 2.")
    class_label = ClassLabel(names=names)
    return {
        split: rows.remove_columns("label").add_column(
            "label", _numbers(values[split], names, split, name), feature=class_label
        )
        for split, rows in splits.items()
    }


def _numbers(labels: Sequence[Any], names: Sequence[str], split: str, name: str) -> list[int]:
    positions = {text: number for number, text in enumerate(names)}
    numbers = [positions.get(label, -1) if isinstance(label, str) else label for label in labels]
    for row, (number, label) in enumerate(zip(numbers, labels, strict=True)):
        if not 0 <= number < len(names):
            raise ValueError(
                f"The label in row {row} of the split {split!r} of {name} is {label!r}, out of range: there are "
                f"{len(names)} "
                f"classes ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})."
            )
    return numbers


def _carve(rows: Dataset, fraction: float, seed: int, name: str) -> tuple[Dataset, Dataset]:
    """Divides a split, stratified by class."""
    counts = np.bincount(np.asarray(rows["label"]), minlength=rows.features["label"].num_classes)
    present = counts[counts > 0]
    smallest = round(fraction * len(rows))
    if present.min() < 2 or smallest < len(present) or len(rows) - smallest < len(present):
        raise ValueError(
            f"{name} is too small to set {fraction:.0%} of its {len(rows)} training images aside with every one of "
            "its "
            f"{len(present)} classes in both parts (the rarest has {present.min()}); provide the split."
        )
    parts = rows.train_test_split(test_size=smallest, stratify_by_column="label", seed=seed)
    return parts["train"], parts["test"]
