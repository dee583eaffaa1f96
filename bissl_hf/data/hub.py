"""Image data sets on the Hugging Face Hub: loading, errors in one sentence, the check of what a name stands for."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .catalogue import CatalogueEntry
from .pixel_file import refuse_cache
from .schema import class_names, is_multi_label

logger = logging.getLogger(__name__)

_ADVICE = (
    "The repository has changed, or is another one than was thought: pass a revision that fits, or its id instead of "
    "the short name, which is loaded as it is."
)


def load_repository(name: str, *, revision: str | None, load_kwargs: Mapping[str, Any]) -> dict[str, Dataset]:
    """Loads all splits of a repository, under its own names.

    Raises:
        `ValueError`: if it cannot be loaded, with the reason and what to do about it; or if `load_kwargs` ask for a
            part of it.
    """
    if load_kwargs.get("split") is not None or load_kwargs.get("streaming"):
        raise ValueError(f"`split` and `streaming` cannot be given for {name!r}: all splits are loaded, whole.")
    try:
        return dict(load_dataset(name, revision=revision, **load_kwargs))
    # The Hub's client, the builders and the network each raise errors of their own, which differ between versions.
    except Exception as error:
        refuse_cache(error)
        raise ValueError(_explain(name, revision, error)) from error


def load_entry(
    name: str, entry: CatalogueEntry, *, revision: str | None, load_kwargs: Mapping[str, Any]
) -> dict[str, Dataset]:
    """Loads a data set of the catalogue and checks its splits, columns and numbers of images.

    Args:
        name (`str`): its short name, for messages.
        entry ([`CatalogueEntry`]): what is known of it.
        revision (`str`, *optional*): instead of the entry's.
        load_kwargs (`Mapping`): for [`datasets.load_dataset`].

    Returns:
        `dict[str, Dataset]`: the splits by the names of the schema.

    Raises:
        `ValueError`: if it cannot be loaded, or is not what the entry says; with what was found.
    """
    options: dict[str, Any] = {"name": entry.config} if entry.config else {}
    if entry.data_files:
        options["data_files"] = {own: entry.data_files.format(own) for own in entry.splits.values()}
    loaded = load_repository(
        entry.repository, revision=revision or entry.revision, load_kwargs={**options, **load_kwargs}
    )
    for commit in {commit for split in loaded.values() for commit in _commits(split)}:
        logger.info(f"{name!r} was read from the commit {commit} of {entry.repository}.")
    where = f"{name!r} ({entry.repository} on the Hub, revision {revision or entry.revision})"
    missing = [entry.splits[split] for split in entry.rows if entry.splits[split] not in loaded]
    if missing:
        raise ValueError(f"{where} has the splits {sorted(loaded)}; {missing} must be among them. {_ADVICE}")
    splits = {split: loaded[own] for split, own in entry.splits.items() if own in loaded}
    for split, dataset in splits.items():
        _check_split(f"The split {split!r} of {where}", entry, split, dataset)
    return splits


def _check_split(where: str, entry: CatalogueEntry, split: str, dataset: Dataset) -> None:
    expected = [entry.image_column, *([entry.label_column] if split != "unlabeled" else [])]
    absent = [column for column in expected if column not in dataset.column_names]
    if absent:
        raise ValueError(f"{where} has the columns {dataset.column_names}; {absent} must be among them. {_ADVICE}")
    known = entry.rows.get(split)
    if known is not None and abs(len(dataset) - known) > entry.rows_tolerance * known:
        about = "about " if entry.rows_tolerance else ""
        raise ValueError(f"{where} has {len(dataset)} images; there must be {about}{known}. {_ADVICE}")


def check_classes(name: str, entry: CatalogueEntry, train: Dataset) -> None:
    """Checks the classes of a data set of the catalogue, once it is in the schema.

    Raises:
        `ValueError`: if there is another number of them, or images have several and should not, or the other way
            round.
    """
    kind = {True: "lists of classes", False: "a class"}
    if is_multi_label(train) != entry.multi_label:
        raise ValueError(
            f"The labels of {name!r} ({entry.repository}) are {kind[is_multi_label(train)]} per image; there must be "
            f"{kind[entry.multi_label]}. {_ADVICE}"
        )
    if len(class_names(train)) != entry.num_classes:
        raise ValueError(
            f"{name!r} ({entry.repository}) has {len(class_names(train))} classes; there must be {entry.num_classes}. "
            f"{_ADVICE}"
        )


def _commits(split: Dataset) -> Iterator[str]:
    """Yields the commit from which a split was read: the cache of `datasets` has a folder of its name."""
    for file in split.cache_files:
        folder = Path(file["filename"]).parent.name
        if re.fullmatch(r"[0-9a-f]{40}", folder):
            yield folder


def _explain(name: str, revision: str | None, error: Exception) -> str:
    """Returns one sentence on why a repository could not be loaded, and what to do."""
    chain = list(_chain(error))
    at = f" at the revision {revision!r}" if revision else ""
    reason = (str(error).strip().splitlines() or ["no reason was given"])[0]

    def is_a(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    if is_a(GatedRepoError) or (is_a(DatasetNotFoundError) and "gated" in str(error)):
        return (
            f"{name!r} is gated on the Hub: accept its terms at https://huggingface.co/datasets/{name}, then log in "
            "with `hf auth login` or set HF_TOKEN to a token of that account."
        )
    if is_a(RevisionNotFoundError) or (is_a(DatasetNotFoundError) and "Revision" in str(error)):
        return f"{name!r} has no revision {revision!r} on the Hub: pass a branch, a tag or a commit that exists."
    if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
        found = re.search(r"\[.*?\]", str(error))
        return f"Choose a configuration of {name!r} with `dataset_config`{f', one of {found[0]}' if found else ''}."
    if is_a(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError) or "Couldn't reach" in str(error):
        return (
            f"{name!r} is no file or folder here, is not in the cache of `datasets`{at}, and the Hub could not be "
            f"reached: {type(error).__name__}: {reason} Connect to it, unset HF_HUB_OFFLINE if it is set, or give a "
            "folder."
        )
    if is_a(RepositoryNotFoundError, DatasetNotFoundError):
        return (
            f"{name!r} is no file or folder here, and no data set on the Hub that you may read{at}: correct the name, "
            "or log in with `hf auth login` if it is private."
        )
    return (
        f"{name!r} is no file or folder here and could not be loaded from the Hub{at}: {type(error).__name__}: "
        f"{reason}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
