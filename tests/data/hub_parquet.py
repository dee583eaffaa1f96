"""Repositories of the catalogue as they lie on the Hub: Parquet files and a card that lists configurations and splits,
with images of a few pixels."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
import yaml
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from bissl_hf.data.catalogue import CatalogueEntry
from tests.hub_stand_in import HubStandIn


def png(color: int, side: int = 2) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (side, side), (color, 255 - color, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def make_split(entry: CatalogueEntry, rows: int, *, labelled: bool = True, side: int = 2) -> Dataset:
    """Row i has the class i modulo the number of classes, which its colour tells; with several labels its neighbour
    too."""
    classes = ClassLabel(names=[f"class {number}" for number in range(entry.num_classes)])
    numbers = [row % entry.num_classes for row in range(rows)]
    several = [sorted({number, (number + 1) % entry.num_classes}) for number in numbers]
    colors = {number: png(number % 256, side) for number in set(numbers)}
    features: dict[str, Any] = {entry.image_column: Image(), "extra": Value("string")}
    columns: dict[str, list] = {
        entry.image_column: [{"bytes": colors[number], "path": None} for number in numbers],
        "extra": ["x"] * rows,
    }
    if labelled:
        features[entry.label_column] = List(classes) if entry.multi_label else classes
        columns[entry.label_column] = several if entry.multi_label else numbers
    return Dataset.from_dict(columns, features=Features(features))


def repository_files(
    entry: CatalogueEntry, splits: Mapping[str, Dataset], *, also: Mapping[str, Dataset] | None = None
) -> dict[str, bytes | str]:
    """Returns the files of the entry's repository.

    Args:
        entry ([`CatalogueEntry`])
        splits (`Mapping`): by the names of the schema.
        also (`Mapping`, *optional*): further splits, by their names in the repository.
    """
    own = {entry.splits.get(split, split): dataset for split, dataset in splits.items()} | dict(also or {})
    pattern = entry.data_files or f"{entry.config or 'data'}/{{}}-*"
    endings = {"*.parquet": "0000.parquet", "-*": "-00000-of-00001-abc.parquet"}
    files: dict[str, bytes | str] = {}
    for split, dataset in own.items():
        path = pattern.format(split)
        for end, ending in endings.items():
            path = path.removesuffix(end) + ending if path.endswith(end) else path
        buffer = io.BytesIO()
        dataset.to_parquet(buffer)
        files[path] = buffer.getvalue()
    if "refs/" not in entry.revision:
        files["README.md"] = _card(entry, own)
    return files


def _card(entry: CatalogueEntry, splits: Mapping[str, Dataset]) -> str:
    """The card that `push_to_hub` writes: the loader compares what it finds with the splits listed here."""
    config = entry.config or "default"
    folder = entry.config or "data"
    sizes = [{"name": s, "num_bytes": 1, "num_examples": len(d)} for s, d in splits.items()]
    features: Sequence[Any] = next(iter(splits.values())).features._to_yaml_list()
    header = {
        "configs": [{"config_name": config, "data_files": [{"split": s, "path": f"{folder}/{s}-*"} for s in splits]}],
        "dataset_info": {"config_name": config, "features": list(features), "splits": sizes},
    }
    return f"---\n{yaml.safe_dump(header)}---\nA card.\n"


def serve(hub: HubStandIn, entry: CatalogueEntry, splits: Mapping[str, Dataset], **options: Any) -> None:
    """Puts the entry's repository on the stand-in, at the revision that the entry names."""
    also = options.pop("also", None)
    repository = hub.add_repository(
        entry.repository, repository_files(entry, splits, also=also), kind="dataset", **options
    )
    repository.branches[entry.revision] = repository.branches["main"]
