"""Folders of images: which of them are splits, which are classes, and what is left out.

The rules are those of `imagefolder` in `datasets`. Where it has none, or where following it would leave images out
that somebody may have meant, the sentence of an error asks.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import Dataset, Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .metadata import METADATA_NAMES, list_metadata
from .paths import count_endings, is_special, walk_files
from .schema import canonical_name, split_in_name

logger = logging.getLogger(__name__)

# Pillow knows the endings of films and vector graphics, and cannot decode them everywhere.
_NO_IMAGES = frozenset({".mpg", ".mpeg", ".wmf", ".emf", ".eps", ".ps", ".pdf"})
IMAGE_SUFFIXES = frozenset({*ImageFolder.EXTENSIONS, ".avif"}) - _NO_IMAGES
_NAMES_TOLD = 10
_RUN_RESULTS = "all_results.json"  # what a run leaves in its folder, as those of transformers do


def is_image_file(path: Path) -> bool:
    """Whether a file is taken for an image, by its ending."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_image_folder(root: Path) -> dict[str, Dataset]:
    """Reads a folder of images, or of folders of classes, or of splits of either.

    A split is a folder after whose name it is called, as in `train`, `seg_train` or `test_set`, or else the images
    whose file names all say it. Where there is a `metadata.csv`, `.jsonl` or `.parquet`, it names the images and the
    labels; otherwise each folder of images is a class. What is left out is logged once.

    Args:
        root (`Path`)

    Returns:
        `dict[str, Dataset]`: the splits by the names of the schema.

    Raises:
        `ValueError`: if there are no images, some are figures of a run, or folders can be read in more than one way.
    """
    everything = list(walk_files(root))
    # Not read, by the rule of `datasets`, which someone who calls a class "__background__" may not know.
    special = [path for path in everything if is_special(path, root)]
    files = [path for path in everything if not is_special(path, root)] if special else everything
    images = [path for path in files if is_image_file(path)]
    _check_images(images)
    _refuse_figures(root, everything, images)
    if not images:
        raise ValueError(
            f"There are no images in {str(root)!r}{_instead(files)}; give a folder of images or of Parquet files."
        )
    top = _first_fork(root, images)
    folders = _split_folders(root, top, images)
    metadata = [path for path in files if path.name in METADATA_NAMES]
    if folders:
        parts = {split: [path for path in images if _is_in(path, folder)] for split, folder in folders.items()}
    else:
        parts, folders = _by_file_names(images), {}
    for split, folder in folders.items():
        if not parts[split]:
            inside = [path for path in files if _is_in(path, folder)]
            raise ValueError(f"There are no images in {str(folder)!r}{_instead(inside)}: fill or remove it.")
    splits, read = {}, set(metadata)
    for split, part in parts.items():
        folder = folders.get(split, top)
        listed = None if split == "unlabeled" else list_metadata(folder, metadata, part)
        splits[split] = _classes(folder, part, split) if listed is None else listed.dataset()
        read |= set(part) if listed is None else listed.paths
    _tell_what_is_left_out(root, [path for path in everything if path not in read], read)
    return splits


def _check_images(images: list[Path]) -> None:
    for path in images:
        if not _is_unicode(path):
            raise ValueError(
                f"The name of the image {os.fsencode(path)!r} is not UTF-8, so that no table can hold it: rename it."
            )
        if not path.exists():
            raise ValueError(
                f"The image {str(path)!r} is a link to {os.readlink(path)!r}, which is not there: restore that file, "
                "or remove the link."
            )


def _refuse_figures(root: Path, files: Iterable[Path], images: Iterable[Path]) -> None:
    """Refuses the output folder of a run among the images: its figures would become a class."""
    runs = {path.parent for path in files if path.name == _RUN_RESULTS}
    for path in images if runs else ():
        if run := next((folder for folder in path.parents if folder in runs), None):
            raise ValueError(
                f"{str(run)!r} is the output folder of a run, and its figures, such as {str(path)!r}, would be read "
                f"as images of {str(root)!r}: move it out of the data, and choose an output_dir outside."
            )


def _is_unicode(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _instead(files: Iterable[Path]) -> str:
    files = list(files)
    return f", whose {count_endings(files)} cannot be read as images" if files else ""


def _is_in(path: Path, folder: Path) -> bool:
    return folder in path.parents


def _below(folder: Path, images: Iterable[Path]) -> tuple[dict[str, list[Path]], list[Path]]:
    """Returns which of the images, all of them inside a folder, are in each folder in it, and which directly in it."""
    inside: dict[str, list[Path]] = {}
    direct = []
    start = len(str(folder)) + 1 if str(folder) != "." else 0
    for path in images:
        name, separator, _ = str(path)[start:].partition(os.sep)
        if separator:
            inside.setdefault(name, []).append(path)
        else:
            direct.append(path)
    return inside, direct


def _first_fork(folder: Path, images: list[Path], *, is_split: bool = False) -> Path:
    """Goes down while a folder holds nothing but one folder of folders, as archives unpack; not into a split, unless
    from one."""
    inside, direct = _below(folder, images)
    if direct or len(inside) != 1:
        return folder
    (name,) = inside
    deeper, direct = _below(folder / name, images)
    enters_split = split_in_name(name) is not None and not any(map(split_in_name, deeper))
    if direct or not deeper or (enters_split and not is_split):
        return folder
    return _first_fork(folder / name, images, is_split=is_split)


def _split_folders(root: Path, top: Path, images: list[Path]) -> dict[str, Path]:
    """Returns the folders that are splits, by the names of the schema; none if the folders are classes."""
    inside, _ = _below(top, images)
    # Without an image, and yet a split that somebody counts on.
    empty = [path.name for path in top.iterdir() if canonical_name(path.name) and path.is_dir()]
    named = {name: split for name in sorted({*inside, *empty}) if (split := split_in_name(name)) is not None}
    others = sorted(set(inside) - set(named))
    if not named or (others and _are_classes(top, named, inside)):
        return {}
    flat = all(not _below(top / name, inside.get(name, []))[0] for name in named)
    if others and (flat or "train" not in named.values()):
        raise ValueError(
            f"The folder {str(root)!r} has {sorted(named)}, which name splits, beside {_some(others)}: put the "
            "folders of the classes into a folder 'train', also those that are called like a split."
        )
    folders: dict[str, Path] = {}
    for name, split in named.items():
        if split in folders:
            raise ValueError(
                f"{str(root)!r} has two splits that mean {split!r}, {folders[split].name!r} and {name!r}: remove one."
            )
        folders[split] = top / name
    return {
        split: _first_fork(folder, inside.get(folder.name, []), is_split=True) for split, folder in folders.items()
    }


def _are_classes(top: Path, named: Mapping[str, str], inside: Mapping[str, list[Path]]) -> bool:
    """Whether folders whose names speak of a split, without being its name (`bullet train`), are classes: they hold
    images as their neighbours do, and no folders."""
    flat = all(not _below(top / name, images)[0] for name, images in inside.items())
    return flat and not any(canonical_name(name) for name in named)


def _by_file_names(images: list[Path]) -> dict[str, list[Path]]:
    """Returns the splits that the names of all files say, or all images as training images."""
    parts: dict[str, list[Path]] = {}
    for path in images:
        split = split_in_name(path.stem)
        if split is None:
            return {"train": images}
        parts.setdefault(split, []).append(path)
    return parts if "train" in parts else {"train": images}


def _classes(folder: Path, images: list[Path], split: str) -> Dataset:
    """Returns images with their labels: the folders in which they are."""
    columns: dict[str, list[str]] = {"image": [str(path) for path in images]}
    inside, direct = _below(folder, images)
    if split != "unlabeled" and inside:
        if direct:
            raise ValueError(f"The image {str(direct[0])!r} is beside the class folders: move it into one of them.")
        _refuse_two_readings(folder, inside)
        names = {str(path): name for name, paths in inside.items() for path in paths}
        columns["label"] = [names[path] for path in columns["image"]]
    return Dataset.from_dict(columns).cast_column("image", Image())


def _refuse_two_readings(folder: Path, inside: Mapping[str, list[Path]]) -> None:
    """Refuses folders in the folders of classes that may be the classes, or splits, themselves."""
    deeper = {name: sorted(_below(folder / name, images)[0]) for name, images in inside.items()}
    for name, names in deeper.items():
        splits = [inner for inner in names if canonical_name(inner) is not None]
        if splits:
            raise ValueError(
                f"The folder {str(folder / name)!r} has {splits}, which name splits, inside what would be a class: "
                f"put the splits outside, the classes inside (as in train/{name}), or give one of the folders."
            )
    nested = {name: names for name, names in deeper.items() if names}
    if len(nested) == len(inside) > 1 and any(len(names) > 1 for names in nested.values()):
        name, names = next((name, names) for name, names in nested.items() if len(names) > 1)
        raise ValueError(
            f"The folders in {str(folder)!r} hold folders, such as {names[0]!r} and {names[1]!r} in {name!r}, and "
            "either level may be the classes: `datasets` reads the inner one, torchvision the outer one. Leave one "
            "level of folders, or list the images in a metadata.csv with the columns 'file_name' and 'label'."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_TOLD} more" if len(names) > _NAMES_TOLD else ""
    return ", ".join(map(repr, names[:_NAMES_TOLD])) + more


def _tell_what_is_left_out(root: Path, rest: list[Path], read: set[Path]) -> None:
    """Logs in one warning what a folder holds beside the images that are read."""
    if not rest:
        return
    with_images = {folder for path in read for folder in path.parents}
    gone = sorted({str(path.parent.relative_to(root)) for path in rest if path.parent not in with_images})
    more = f" and {len(gone) - _NAMES_TOLD} more" if len(gone) > _NAMES_TOLD else ""
    folders = f"; nothing is read of the folders {gone[:_NAMES_TOLD]}{more}" if gone else ""
    logger.warning(f"Left out of {str(root)!r}: {count_endings(rest)}{folders}.")
