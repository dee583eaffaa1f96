"""Labelled image data sets by name, folder, Parquet file or Hub id, all in one schema.

The schema: splits `train`, `validation` and `test` with a column `image` ([`datasets.Image`]) and a column `label`
([`datasets.ClassLabel`] with names), and a split `unlabeled` with images only where the source has one.
"""

import difflib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled", "unsupervised"),
}
# fmt: off
_IMAGE_SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2",
    ".avif",
})
# fmt: on
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class NamedSource:
    """A data set that has a short name.

    Args:
        load (`Callable[[], DatasetDict]`): returns the splits as the source has them.
        image_column (`str`, *optional*, defaults to `"image"`): column of the images.
        label_column (`str`, *optional*, defaults to `"label"`): column of the labels.
    """

    load: Callable[[], DatasetDict]
    image_column: str = "image"
    label_column: str = "label"


def load_image_dataset(
    name: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    revision: str | None = None,
    require_labels: bool = True,
    **load_kwargs: Any,
) -> DatasetDict:
    """Loads an image classification data set in the schema of this module.

    A missing test split, and then a missing validation split, is taken from the training split: the fraction of each
    class, at least one image of it. A class with a single image stays in the training split (logged as a warning).

    Args:
        name (`str` or `os.PathLike`): `digits` (1,797 digits of 8x8 pixels that ship with scikit-learn); or a folder
            with one folder of images per class, or with folders `train`, `validation`, `test` of such class folders,
            and maybe `unlabeled` with images; or a Parquet file, or a folder of Parquet files whose names or folders
            tell the split; or else a Hub id such as `user/name`.
        image_column (`str`, *optional*): column of the images. By default the only column of images, or one that is
            named in `IMAGE_COLUMNS`.
        label_column (`str`, *optional*): column of the labels: class labels, integers from 0, or strings, whose
            classes are put in alphabetical order. By default the first of `LABEL_COLUMNS` that exists.
        validation_fraction (`float`, *optional*, defaults to 0.1): share of the training images that make a missing
            split. Between 0 and 1, both excluded.
        seed (`int`, *optional*, defaults to 0): decides which images. The test split of `digits` does not depend on
            it.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        require_labels (`bool`, *optional*, defaults to `True`): whether a source without labels is an error.
            Otherwise its images are returned as the only split, `unlabeled`.
        **load_kwargs: passed to [`datasets.load_dataset`] for a Hub id.

    Returns:
        `DatasetDict`: splits `train`, `validation`, `test`, and `unlabeled` where the source has one.

    Raises:
        `ValueError`: if the source cannot be found or read, or lacks images, labels, a column or the training split;
            if a split is empty, labels are outside their classes or the splits disagree in them; or if
            `validation_fraction` or `seed` is out of range, or an option does not apply to the source.

    Example:

    ```python
    >>> from bissl_hf import load_image_dataset
    >>> digits = load_image_dataset("digits")
    >>> digits["train"].features["label"].num_classes
    10
    ```
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"`validation_fraction` is {validation_fraction}; it must be above 0 and below 1.")
    if seed < 0:
        raise ValueError(f"`seed` is {seed}; it must be at least 0.")
    name = os.fspath(name)
    if name in NAMED_SOURCES:
        image_column = image_column or NAMED_SOURCES[name].image_column
        label_column = label_column or NAMED_SOURCES[name].label_column
    splits = _canonical_splits(name, _load_source(name, revision, load_kwargs))
    image_column = _find_image_column(name, splits, image_column)
    found_label_column = _find_label_column(name, splits, label_column)
    if found_label_column is None:
        if require_labels:
            columns = next(iter(splits.values())).column_names
            raise ValueError(
                f"No labels were found in {name!r}, whose columns are {columns}: name one with `label_column`, or put "
                "the images of each class into a folder of its own."
            )
        unlabeled = splits.get("unlabeled", splits.get("train", next(iter(splits.values()))))
        return DatasetDict(unlabeled=_select(name, unlabeled, image_column))
    if "train" not in splits:
        raise ValueError(f"{name!r} has the splits {sorted(splits)}; it must have a split 'train'.")
    labelled = _encode_labels(name, splits, image_column, found_label_column)
    for split in ("test", "validation"):
        if split not in labelled:
            labelled = _carve(name, labelled, split, validation_fraction, seed)
    result = DatasetDict({split: labelled[split] for split in ("train", "validation", "test")})
    if "unlabeled" in splits:
        result["unlabeled"] = _select(name, splits["unlabeled"], image_column)
    return result


def stratified_rows(
    labels: Sequence[int] | np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Divides row numbers into two parts with the same mix of classes.

    Args:
        labels (`Sequence[int]` or `np.ndarray`): class number of each row.
        fraction (`float`): share of each class that goes into the second part. Rounded, but at least one row of the
            class goes into each part.
        seed (`int`): decides which rows.

    Returns:
        `tuple`: sorted rows of the first part, of the second part, and the classes that have a single row, which is
            in the first part.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    second: list[np.ndarray] = []
    single = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) == 1:
            single.append(int(label))
        second.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    chosen = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen, single


# Reading a source: each function returns the splits under the source's own names.


def _load_source(name: str, revision: str | None, load_kwargs: dict[str, Any]) -> dict[str, Dataset]:
    path = Path(name).expanduser()
    is_hub_id = name not in NAMED_SOURCES and not path.exists() and _HUB_ID.fullmatch(name) is not None
    if is_hub_id:
        return _load_hub(name, revision, load_kwargs)
    options = sorted([*load_kwargs, *(["revision"] if revision is not None else [])])
    if options:
        raise ValueError(f"{options} apply to data sets on the Hub only, and {name!r} is none: leave them out.")
    if name in NAMED_SOURCES:
        return dict(NAMED_SOURCES[name].load())
    if not path.exists():
        close = difflib.get_close_matches(name, NAMED_SOURCES)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"There is no data set {name!r}: it is no file or folder here, no known name (these are "
            f"{sorted(NAMED_SOURCES)}), and no Hub id of the form 'user/name'.{hint}"
        )
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"{name!r} is a file of the type {path.suffix!r}; give a Parquet file or a folder.")
    return _load_parquet(path, files) if files else _load_folder(path)


def _load_digits() -> DatasetDict:
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels = np.round(source.images * (255 / 16)).astype(np.uint8)
    digits = Dataset.from_dict({"image": [PIL.Image.fromarray(image) for image in pixels]})
    names = [str(label) for label in source.target_names]
    digits = digits.add_column("label", source.target.tolist(), feature=ClassLabel(names=names))
    train, test, _ = stratified_rows(source.target, fraction=0.2, seed=0)
    return DatasetDict(train=digits.select(train), test=digits.select(test))


def _load_hub(name: str, revision: str | None, load_kwargs: dict[str, Any]) -> dict[str, Dataset]:
    if load_kwargs.get("split") is not None or load_kwargs.get("streaming"):
        raise ValueError(f"`split` and `streaming` cannot be given for {name!r}: all splits are loaded, whole.")
    try:
        loaded = load_dataset(name, revision=revision, **load_kwargs)
    # The Hub's client, the builders and the network each raise errors of their own, which differ between versions.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason was given"])[0]
        raise ValueError(
            f"{name!r} is no file or folder here and could not be loaded from the Hub: {type(error).__name__}: "
            f"{reason}"
        ) from error
    return dict(loaded)


def _load_parquet(root: Path, files: list[Path]) -> dict[str, Dataset]:
    data_files: dict[str, list[str]] = {}
    for file in files:
        # "train-00000-of-00002.parquet", "data/train-0.parquet" and "train/0000.parquet" are all in use.
        parts = [] if file == root else [file.stem, *reversed(file.relative_to(root).parts[:-1])]
        split = next(filter(None, (_canonical_name(re.split(r"[-_.]", part)[0]) for part in parts)), None)
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
    by_split = {folder.name: folder for folder in folders if _canonical_name(folder.name) is not None}
    others = [folder.name for folder in folders if folder.name not in by_split]
    if not by_split:
        by_split = {"train": root}
    elif "train" not in map(_canonical_name, by_split) and others:
        raise ValueError(
            f"The folder {str(root)!r} has {sorted(by_split)}, which name splits, beside {others[0]!r}: put the "
            "folders of the classes into a folder 'train'."
        )
    elif others:
        logger.warning(f"The folders {others} in {str(root)!r} name no split and are not read.")
    return {
        split: _read_class_folders(folder, labelled=_canonical_name(split) != "unlabeled")
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


def _image_files(root: Path) -> Iterator[Path]:
    yield from sorted(
        path
        for path in root.iterdir()
        if path.is_file() and path.suffix.lower() in _IMAGE_SUFFIXES and not path.name.startswith(".")
    )
    for folder in _folders(root):
        yield from _image_files(folder)


# From a source's own splits and columns to the schema.


def _canonical_name(split: str) -> str | None:
    return next((name for name, aliases in _SPLIT_NAMES.items() if split.lower() in aliases), None)


def _canonical_splits(name: str, loaded: dict[str, Dataset]) -> dict[str, Dataset]:
    splits: dict[str, Dataset] = {}
    for own_name, split in loaded.items():
        canonical = _canonical_name(own_name)
        if canonical is None:
            logger.info(f"The split {own_name!r} of {name!r} is not used.")
        elif canonical in splits:
            raise ValueError(f"{name!r} has two splits that mean {canonical!r}, one of them {own_name!r}: remove one.")
        elif len(split) == 0:
            raise ValueError(f"The split {own_name!r} of {name!r} is empty: fill or remove it.")
        else:
            splits[canonical] = split
    if not splits:
        raise ValueError(f"{name!r} has the splits {sorted(loaded)}; it must have a split 'train'.")
    return splits


def _find_image_column(name: str, splits: dict[str, Dataset], given: str | None) -> str:
    first = next(iter(splits.values()))
    typed = [column for column, feature in first.features.items() if isinstance(feature, Image)]
    candidates = typed if len(typed) == 1 else [column for column in IMAGE_COLUMNS if column in first.column_names]
    column = given or next(iter(candidates), None)
    if column is None:
        raise ValueError(
            f"No column of images was found in {name!r}, whose columns are {first.column_names}: name one with "
            "`image_column`."
        )
    _require_column(name, splits, column, "image_column")
    return column


def _find_label_column(name: str, splits: dict[str, Dataset], given: str | None) -> str | None:
    labelled = {split: dataset for split, dataset in splits.items() if split != "unlabeled"}
    known = [column for dataset in labelled.values() for column in LABEL_COLUMNS if column in dataset.column_names]
    column = given or next(iter(known), None)
    if column is not None:
        _require_column(name, labelled, column, "label_column")
    return column if labelled else None


def _require_column(name: str, splits: dict[str, Dataset], column: str, argument: str) -> None:
    for split, dataset in splits.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"The split {split!r} of {name!r} has no column {column!r}; its columns are {dataset.column_names}: "
                f"choose one with `{argument}`."
            )


def _select(name: str, dataset: Dataset, image_column: str, label_column: str | None = None) -> Dataset:
    """Returns the columns as `image` and, where a label column is given, `label`."""
    feature = dataset.features[image_column]
    is_encoded = isinstance(feature, dict) and "bytes" in feature
    is_encoded = is_encoded or (isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "string"))
    if not isinstance(feature, Image) and not is_encoded:
        raise ValueError(
            f"The column {image_column!r} of {name!r} is {feature}; it must hold images, encoded bytes or paths: "
            "choose another column with `image_column`."
        )
    columns = {image_column: "image"} | ({} if label_column is None else {label_column: "label"})
    dataset = dataset.select_columns(list(columns))
    # Both at once: one of them may have the other's new name.
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    return dataset.cast_column("image", Image()) if is_encoded else dataset


def _encode_labels(name: str, splits: dict[str, Dataset], image_column: str, label_column: str) -> dict[str, Dataset]:
    """Returns the labelled splits with the columns `image` and `label`."""
    labelled = {split: dataset for split, dataset in splits.items() if split != "unlabeled"}
    values = {split: dataset.select_columns([label_column])[:][label_column] for split, dataset in labelled.items()}
    names = _class_names(name, labelled, values, label_column)
    numbers = {class_name: number for number, class_name in enumerate(names)}
    encoded = {}
    for split, dataset in labelled.items():
        codes = [numbers.get(value, -1) if isinstance(value, str) else value for value in values[split]]
        for row, (code, value) in enumerate(zip(codes, values[split], strict=True)):
            where = f"row {row} of the split {split!r} of {name!r}"
            if value is None:
                raise ValueError(f"There is no label in {where}: remove the row, or choose another `label_column`.")
            if not 0 <= code < len(names):
                allowed = f"a class of 'train': {_abridged(names)}" if code is not value else f"0 to {len(names) - 1}"
                raise ValueError(
                    f"The label in {where} is {value!r}; it must be {allowed}. Correct or remove the row, or choose "
                    "another `label_column`."
                )
        encoded[split] = _select(name, dataset, image_column, label_column)
        # Replacing a column copies a split that is a selection of rows, so it is done only where it has to be.
        if not isinstance(dataset.features[label_column], ClassLabel):
            encoded[split] = encoded[split].remove_columns("label")
            encoded[split] = encoded[split].add_column("label", list(map(int, codes)), feature=ClassLabel(names=names))
    return encoded


def _abridged(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _label_kind(feature: Any) -> str | list[str]:
    """Returns the names of class labels, or a word for other labels."""
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    dtype = feature.dtype if isinstance(feature, Value) else ""
    if dtype in ("string", "large_string"):
        return "strings"
    return "integers" if dtype == "bool" or dtype.startswith(("int", "uint")) else str(feature)


def _class_names(
    name: str, splits: dict[str, Dataset], values: dict[str, Iterable[Any]], label_column: str
) -> list[str]:
    kinds = {split: _label_kind(dataset.features[label_column]) for split, dataset in splits.items()}
    kind = kinds["train"]
    for split, other in kinds.items():
        if other != kind:
            raise ValueError(
                f"The classes in the column {label_column!r} of {name!r} are {kind} in 'train' and {other} in "
                f"{split!r}; they must be the same."
            )
    if isinstance(kind, list):
        return kind
    if kind == "strings":
        return sorted({value for value in values["train"] if value is not None})
    if kind == "integers":
        highest = max((value for split in values.values() for value in split if value is not None), default=-1)
        return [str(number) for number in range(int(highest) + 1)]
    raise ValueError(
        f"The column {label_column!r} of {name!r} is {kind}; labels must be class labels, integers or strings: choose "
        "another column with `label_column`."
    )


def _carve(name: str, splits: dict[str, Dataset], new: str, fraction: float, seed: int) -> dict[str, Dataset]:
    """Moves a share of the training split into a new split."""
    train = splits["train"]
    rest, chosen, single = stratified_rows(train.select_columns(["label"])[:]["label"], fraction, seed)
    if len(chosen) == 0:
        raise ValueError(
            f"{name!r} has no {new!r} split, and none can be taken from 'train', where every class has one image: add "
            f"images or a {new!r} split."
        )
    logger.info(f"{name!r} has no {new!r} split: {len(chosen)} of {len(train)} training images make it.")
    if single:
        classes = [train.features["label"].int2str(label) for label in single]
        logger.warning(f"The {new!r} split of {name!r} lacks the classes with one training image: {classes}.")
    return {**splits, "train": train.select(rest), new: train.select(chosen)}


NAMED_SOURCES: dict[str, NamedSource] = {"digits": NamedSource(load=_load_digits)}
