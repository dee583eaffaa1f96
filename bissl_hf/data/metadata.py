"""`metadata.csv`, `.jsonl` and `.parquet` beside images, in the form that `imagefolder` of `datasets` reads."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd  # type: ignore[import-untyped]
from datasets import Dataset, Image

METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
_NAMES_TOLD = 3


@dataclass(frozen=True)
class ListedImages:
    """The images that files of metadata list, one a row, with the other columns of these files.

    Args:
        table (`pd.DataFrame`): with a column `image` of paths.
    """

    table: pd.DataFrame

    @property
    def paths(self) -> set[Path]:
        """The images."""
        return set(map(Path, self.table["image"]))

    def dataset(self) -> Dataset:
        """Returns the rows."""
        return Dataset.from_pandas(self.table, preserve_index=False).cast_column("image", Image())


def list_metadata(folder: Path, files: Sequence[Path], images: Sequence[Path]) -> ListedImages | None:
    """Reads the files of metadata that are in the folder of a split or, if there are none, above it.

    Args:
        folder (`Path`): of the split.
        files (`Sequence[Path]`): all files of metadata of the data set.
        images (`Sequence[Path]`): all images of the split.

    Returns:
        [`ListedImages`], *optional*: in their order; `None` if there is no metadata.

    Raises:
        `ValueError`: if a file cannot be read, has no column `file_name`, or lists an image that is not there.
    """
    inside = [path for path in files if folder in path.parents]
    chosen = inside or [path for path in files if path.parent in folder.parents]
    if not chosen:
        return None
    table = pd.concat([_read(path) for path in chosen], ignore_index=True)
    found = table["image"].map({os.path.abspath(path): str(path) for path in images})
    if not inside:
        # One file for all splits lists the images of the others too.
        mine = found.notna() | ~table["image"].map(os.path.exists)
        table, found = table[mine], found[mine]
    missing = table["image"][found.isna()].tolist()
    if missing:
        raise ValueError(
            f"{len(missing)} images that {str(chosen[0])!r} lists are not there, or are no images: "
            f"{', '.join(map(repr, missing[:_NAMES_TOLD]))}{' ...' if len(missing) > _NAMES_TOLD else ''}: correct "
            "'file_name', or remove these rows."
        )
    return ListedImages(table.assign(image=found).reset_index(drop=True))


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix == ".csv":
            table = pd.read_csv(path)
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            table = pd.DataFrame([json.loads(line) for line in lines if line.strip()])
    # Each reader has errors of its own.
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason was given"])[0]
        raise ValueError(f"The file {str(path)!r} cannot be read: {reason} Correct or remove it.") from error
    if "file_name" not in table.columns:
        raise ValueError(
            f"The file {str(path)!r} has the columns {list(map(str, table.columns))}; one of them must be "
            "'file_name', the path of an image beside it."
        )
    folder = os.path.abspath(path.parent)
    names = table.pop("file_name")
    if names.isna().any():
        raise ValueError(f"The file {str(path)!r} has no 'file_name' in row {int(names.isna().argmax())}: remove it.")
    table["image"] = [os.path.normpath(os.path.join(folder, str(name))) for name in names]
    return table
