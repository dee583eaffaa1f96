"""What data sets and models are called where others read it. Local paths are never published."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .catalogue import CATALOGUE
from .paths import expand_path, parquet_files
from .sources import DIGITS, MNIST_5000

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class PublicName:
    """What may be said of a data set in public.

    Args:
        title (`str`): for people.
        identifier (`str`, *optional*): for machines: a Hub id, the name of a builder of `datasets`, or a short name.
        repository (`str`, *optional*): its Hub id, where it has one.
        config, revision (`str`, *optional*): which part and state of the repository is read.
        splits (`Mapping[str, str]`, *optional*): the repository's names of the splits that it has, by ours, if known.
    """

    title: str
    identifier: str | None = None
    repository: str | None = None
    config: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)


def hub_repository(name: str | os.PathLike[str] | None) -> str | None:
    """Returns a name that is a Hub id, and `None` for anything else, such as a file or folder here."""
    name = os.fspath(name or "")
    if not _HUB_ID.fullmatch(name) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str | os.PathLike[str]) -> PublicName:
    """Returns what may be said of a data set.

    Args:
        name (`str` or `os.PathLike`): as [`load_image_dataset`] takes it: a short name, a file, a folder or a Hub id;
            or else a title.

    Example:

    ```python
    >>> public_name("cifar10").repository
    'uoft-cs/cifar10'
    ```
    """
    name = os.fspath(name)
    if entry := CATALOGUE.get(name):
        return PublicName(
            entry.title,
            entry.repository,
            entry.repository,
            config=entry.config,
            revision=entry.revision,
            splits=entry.splits,
        )
    if name == DIGITS:
        return PublicName("the digits of scikit-learn", DIGITS)
    if name == MNIST_5000:
        return PublicName("5,000 digits of MNIST", "mnist")
    path = expand_path(name)
    if os.path.isdir(path) and not parquet_files(Path(path)):
        return PublicName("a folder of images", "imagefolder")
    if os.path.exists(path):
        return PublicName("Parquet files", "parquet")
    if repository := hub_repository(name):
        return PublicName(repository, repository, repository)
    if "/" in name or "\\" in name:
        return PublicName("local files")
    return PublicName(name, re.sub(r"[^\w.-]+", "-", name).strip("-").lower() or None)
