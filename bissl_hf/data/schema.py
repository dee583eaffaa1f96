"""The one schema of all image data sets, and how a source's own splits and columns are brought into it.

The schema: splits `train`, `validation` and `test` with a column `image` ([`datasets.Image`]) and a column `label`,
and a split `unlabeled` with images only where the source has one. A label is a [`datasets.ClassLabel`] with names, or
a list of them where an image may have several classes.
"""

import logging
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Image, LargeList, List, Value

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "picture")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled", "unsupervised"),
}
_EVALUATION = ("validation", "test")
_PLAIN_TYPES = {
    **dict.fromkeys(("large_string", "string_view"), "string"),
    **dict.fromkeys(("large_binary", "binary_view"), "binary"),
}
# What `datasets` takes for the end of a word in the name of a file or folder.
_WORD_ENDS = re.compile(r"[-._ 0-9]+")


def is_multi_label(split: Dataset) -> bool:
    """Whether the images of a labelled split in the schema may have several classes."""
    return isinstance(split.features["label"], List)


def class_names(split: Dataset) -> list[str]:
    """Returns the names of the classes of a labelled split in the schema."""
    feature = split.features["label"]
    return (feature.feature if is_multi_label(split) else feature).names


def labels_of(split: Dataset) -> np.ndarray:
    """Returns the labels of a split in the schema: class numbers, int64, shape `(rows,)`; or multi-hot, float32, shape
    `(rows, classes)`, where an image may have several classes."""
    values = split.with_format(None).select_columns(["label"])[:]["label"]
    if not is_multi_label(split):
        return np.asarray(values, dtype=np.int64)
    multi_hot = np.zeros((len(values), len(class_names(split))), dtype=np.float32)
    for row, classes in enumerate(values):
        multi_hot[row, classes] = 1
    return multi_hot


def canonical_name(split: str) -> str | None:
    """Returns the schema's name of a split that a source calls so, or `None`."""
    return next((name for name, aliases in _SPLIT_NAMES.items() if split.lower() in aliases), None)


def split_in_name(name: str) -> str | None:
    """Returns the schema's name of the split that a file or folder is named after, as in `seg_train`, `training_set`
    or `test-00000-of-00001`, by the rule of `datasets`; `None` if it names none, or two."""
    words = [word.lower() for word in _WORD_ENDS.split(name)]
    found = {"test" if word in ("eval", "evaluation") else canonical_name(word) for word in words} - {None}
    return found.pop() if len(found) == 1 else None


def canonical_splits(name: str, loaded: dict[str, Dataset]) -> dict[str, Dataset]:
    """Renames the splits of the source `name`; others are left out.

    Raises:
        `ValueError`: if a split is empty, two splits mean the same one, or there is none.
    """
    splits: dict[str, Dataset] = {}
    for own_name, split in loaded.items():
        canonical = canonical_name(own_name)
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


def find_image_column(name: str, splits: dict[str, Dataset], given: str | None) -> str:
    """Returns the column of images: the one that is `given`, the only one of images, or one with a usual name.

    Raises:
        `ValueError`: if there is none, or a split lacks it.
    """
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


def find_label_column(name: str, splits: dict[str, Dataset], given: str | None) -> str | None:
    """Returns the column of labels, the one that is `given` or one with a usual name; `None` if there is none.

    Raises:
        `ValueError`: if the training split, or all labelled splits, lack it.
    """
    labelled = {split: dataset for split, dataset in splits.items() if split != "unlabeled"}
    known = [column for dataset in labelled.values() for column in LABEL_COLUMNS if column in dataset.column_names]
    column = given or next(iter(known), None)
    if column is not None:
        without = [split for split in _EVALUATION if split in labelled and column not in labelled[split].column_names]
        required = {split: dataset for split, dataset in labelled.items() if split not in without}
        _require_column(name, required or labelled, column, "label_column")
    return column if labelled else None


def drop_splits_without_labels(name: str, splits: dict[str, Dataset], label_column: str) -> dict[str, Dataset]:
    """Leaves out validation and test splits that have no labels, as those of competitions: no such column, or every
    label missing or below 0. This is logged."""
    kept = dict(splits)
    for split in set(_EVALUATION) & set(splits):
        dataset = splits[split]
        labels = _labels(_values(dataset, label_column)) if label_column in dataset.column_names else ()
        if all(label is None or (isinstance(label, int) and label < 0) for label in labels):
            logger.warning(f"The split {split!r} of {name!r} has no labels and is not used.")
            del kept[split]
    return kept


def tells_classes(split: Dataset, label_column: str) -> bool:
    """Whether the column holds labels by which images can be classified: numbers from 0 or text, none missing, at
    least two classes, and one of them with two images."""
    labels = list(_labels(_values(split, label_column)))
    if not all(isinstance(label, str) or (isinstance(label, int) and label >= 0) for label in labels):
        return False
    counts = Counter(labels)
    return len(counts) > 1 and max(counts.values()) > 1


def _require_column(name: str, splits: dict[str, Dataset], column: str, argument: str) -> None:
    for split, dataset in splits.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"The split {split!r} of {name!r} has no column {column!r}; its columns are {dataset.column_names}: "
                f"choose one with `{argument}`."
            )


def select_columns(name: str, dataset: Dataset, image_column: str, label_column: str | None = None) -> Dataset:
    """Returns the columns as `image` and, where a label column is given, `label`.

    Raises:
        `ValueError`: if the column of images holds something else.
    """
    feature = dataset.features[image_column]
    plain = _plain(feature)
    is_encoded = isinstance(plain, dict) and "bytes" in plain
    is_encoded = is_encoded or (isinstance(plain, Value) and plain.dtype in ("binary", "string"))
    if not isinstance(feature, Image) and not is_encoded:
        raise ValueError(
            f"The column {image_column!r} of {name!r} is {feature}; it must hold images, encoded bytes or paths: "
            "choose another column with `image_column`."
        )
    columns = {image_column: "image"} | ({} if label_column is None else {label_column: "label"})
    dataset = dataset.select_columns(list(columns))
    # Both at once: one of them may have the other's new name.
    dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    if is_encoded and plain != feature:
        dataset = dataset.cast_column("image", plain)
    return dataset.cast_column("image", Image()) if is_encoded else dataset


def encode_labels(name: str, splits: dict[str, Dataset], image_column: str, label_column: str) -> dict[str, Dataset]:
    """Returns the labelled splits with the columns `image` and `label`.

    Raises:
        `ValueError`: if a label is missing or none of the classes, or the splits disagree in them.
    """
    labelled = {split: dataset for split, dataset in splits.items() if split != "unlabeled"}
    values = {split: _values(dataset, label_column) for split, dataset in labelled.items()}
    names = _class_names(name, labelled, values, label_column)
    numbers = {class_name: number for number, class_name in enumerate(names)}
    encoded = {}
    for split, dataset in labelled.items():
        feature = dataset.features[label_column]
        codes = []
        for row, value in enumerate(values[split]):
            labels = value if _is_list(feature) and value is not None else [value]
            where = f"row {row} of the split {split!r} of {name!r}"
            codes.append([_class_number(label, numbers, names, where) for label in labels])
        encoded[split] = select_columns(name, dataset, image_column, label_column)
        classes = ClassLabel(names=names)
        target = List(classes) if _is_list(feature) else classes
        # Replacing a column copies a split that is a selection of rows, so it is done only where it has to be.
        if feature != target:
            column = codes if _is_list(feature) else [code for (code,) in codes]
            encoded[split] = encoded[split].remove_columns("label").add_column("label", column, feature=target)
    return encoded


def _class_number(label: Any, numbers: dict[str, int], names: list[str], where: str) -> int:
    if label is None:
        raise ValueError(f"There is no label in {where}: remove the row, or choose another `label_column`.")
    code = numbers.get(label, -1) if isinstance(label, str) else int(label)
    if not 0 <= code < len(names):
        allowed = f"a class of 'train': {_abridged(names)}" if isinstance(label, str) else f"0 to {len(names) - 1}"
        raise ValueError(
            f"The label in {where} is {label!r}; it must be {allowed}. Correct or remove the row, or choose another "
            "`label_column`."
        )
    return code


def _abridged(names: list[str]) -> str:
    return ", ".join(map(repr, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _is_list(feature: Any) -> bool:
    return isinstance(feature, List | LargeList)


def _element(feature: Any) -> Any:
    return feature.feature if _is_list(feature) else feature


def _label_kind(feature: Any, values: Iterable[Any]) -> tuple[str | list[str], str]:
    """Returns the names of class labels, or the kind of other labels; and their description in messages."""
    element = _element(feature)
    dtype = element.dtype if isinstance(element, Value) else ""
    kind: str | list[str]
    if isinstance(element, ClassLabel):
        kind = [unicodedata.normalize("NFC", name) for name in element.names]
    elif _PLAIN_TYPES.get(dtype, dtype) == "string":
        kind = "strings"
    else:
        is_whole = dtype.startswith("float") and not any(isinstance(label, float) for label in _labels(values))
        kind = "integers" if dtype == "bool" or dtype.startswith(("int", "uint")) or is_whole else str(feature)
    return kind, f"{'lists of ' if _is_list(feature) else ''}{kind}"


def _class_names(name: str, splits: dict[str, Dataset], values: dict[str, list[Any]], label_column: str) -> list[str]:
    kinds = {split: _label_kind(dataset.features[label_column], values[split]) for split, dataset in splits.items()}
    kind, described = kinds["train"]
    for split, (_, other) in kinds.items():
        if other != described:
            raise ValueError(
                f"The classes in the column {label_column!r} of {name!r} are {described} in 'train' and {other} in "
                f"{split!r}; they must be the same."
            )
    if isinstance(kind, list):
        if repeated := [class_name for class_name, count in Counter(kind).items() if count > 1]:
            raise ValueError(
                f"The column {label_column!r} of {name!r} has {len(repeated)} classes twice, in two Unicode forms of "
                f"one name, such as {repeated[0]!a}: rename one of them."
            )
        return kind
    if kind == "strings":
        return _names_of_texts({label for label in _labels(values["train"]) if label is not None}, name, label_column)
    if kind == "integers":
        found = {int(label) for split in values.values() for label in _labels(split) if label is not None}
        highest, missing = max(found, default=-1), next(number for number in count() if number not in found)
        if missing < highest:
            raise ValueError(
                f"The labels in the column {label_column!r} of {name!r} reach {highest}, and none is "
                f"{missing}; whole numbers must be 0, 1, 2, ... without gaps. Number the classes anew, or name "
                "them: labels as text, or a column of the feature ClassLabel."
            )
        return [str(number) for number in range(highest + 1)]
    raise ValueError(
        f"The column {label_column!r} of {name!r} is {kind}; labels must be class labels, integers or strings, or "
        "lists of them: choose another column with `label_column`."
    )


def _names_of_texts(labels: set[str], name: str, label_column: str) -> list[str]:
    """Returns labels that are texts as names of classes, sorted."""
    if blank := sorted(label for label in labels if label != label.strip() and label.strip() in labels):
        raise ValueError(
            f"The column {label_column!r} of {name!r} has the classes {blank[0].strip()!a} and {blank[0]!a}, which "
            "differ by blanks alone: write them in one way."
        )
    return sorted(labels)


def _values(dataset: Dataset, label_column: str) -> list[Any]:
    """Returns the labels of each row: text in one Unicode form, whole numbers as `int`, what is missing or
    an empty text as `None`."""
    values = dataset.with_format(None).select_columns([label_column])[:][label_column]
    return [
        [_plain_label(label) for label in value] if isinstance(value, list) else _plain_label(value)
        for value in values
    ]


def _plain_label(label: Any) -> Any:
    if isinstance(label, str):
        # The same letters, as macOS and Linux write them in names of folders.
        return unicodedata.normalize("NFC", label) if label.strip() else None
    if isinstance(label, float):
        if math.isnan(label):
            return None
        return int(label) if label.is_integer() else label
    return int(label) if isinstance(label, bool) else label


def _plain(feature: Any) -> Any:
    """Returns a feature with the common types of Arrow in the place of those with other offsets, or of views."""
    if isinstance(feature, Value):
        return Value(_PLAIN_TYPES.get(feature.dtype, feature.dtype))
    return {name: _plain(inner) for name, inner in feature.items()} if isinstance(feature, dict) else feature


def _labels(values: Iterable[Any]) -> Iterable[Any]:
    """Yields labels one by one, whether a row has one or a list of them."""
    for value in values:
        yield from value if isinstance(value, list) else [value]
