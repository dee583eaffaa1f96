"""Images and labels in IDX files, the format of MNIST and Fashion-MNIST, plain or compressed by gzip."""

import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image

from .catalogue import CATALOGUE

_PREFIXES = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"
_UNSIGNED_BYTE = 8


def has_idx_files(folder: Path) -> bool:
    """Whether this is a folder of IDX files: one with the training images under their usual name."""
    return _find(folder, _PREFIXES["train"], _IMAGES) is not None


def read_idx_folder(folder: Path) -> dict[str, Dataset]:
    """Reads the splits `train` and `test` of a folder of IDX files.

    The files name no classes. A folder that has the name of a data set of the catalogue (`fashion-mnist` or `mnist`)
    takes its class names, and must hold its number of images.

    Args:
        folder (`Path`): with `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and maybe `t10k-...` likewise, each
            with or without `.gz`.

    Raises:
        `ValueError`: if a file is missing, is not whole, or does not fit its neighbour.
    """
    entry = CATALOGUE.get(folder.resolve().name.lower().replace("-", "_"))
    class_names = entry.class_names if entry else None
    splits = {
        split: _read_split(folder, prefix, class_names)
        for split, prefix in _PREFIXES.items()
        if _find(folder, prefix, _IMAGES) is not None
    }
    for split, dataset in splits.items():
        if entry and class_names and len(dataset) != entry.rows[split]:
            raise ValueError(
                f"The IDX files of {split!r} in {str(folder)!r} hold {len(dataset)} images; {entry.title}, whose name "
                f"the folder bears, has {entry.rows[split]}. Complete the files or rename the folder."
            )
    return splits


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads an IDX file of unsigned bytes.

    Args:
        path (`Path`): decompressed if its name ends in `.gz`.
        dimensions (`int`): how many the array must have.

    Raises:
        `ValueError`: if the file cannot be read, is no such file, or holds another number of bytes than it says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"The IDX file {str(path)!r} cannot be read: {error}. Get it anew.") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise ValueError(
            f"{str(path)!r} is no IDX file of unsigned bytes in {dimensions} dimensions: it starts with "
            f"{content[:4].hex(' ') or 'nothing'}, which must be 00 00 08 0{dimensions}."
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != int(np.prod(shape)):
        raise ValueError(
            f"The IDX file {str(path)!r} holds {len(content) - header} bytes of data; its shape {shape} needs "
            f"{int(np.prod(shape))}. Get it anew."
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _read_split(folder: Path, prefix: str, class_names: Sequence[str] | None) -> Dataset:
    images_path, labels_path = (_find(folder, prefix, kind) for kind in (_IMAGES, _LABELS))
    if images_path is None or labels_path is None:
        raise ValueError(f"The labels {prefix}-{_LABELS} (or .gz) are missing in {str(folder)!r}; put them there.")
    images, labels = read_idx(images_path, dimensions=3), read_idx(labels_path, dimensions=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{str(images_path)!r} holds {len(images)} images and {str(labels_path)!r} {len(labels)} labels; they "
            "must be as many."
        )
    names = list(class_names or map(str, range(int(labels.max(initial=0)) + 1)))
    # A PGM file is its pixels behind a short header, so that nothing has to be compressed here and again decoded.
    header = f"P5 {images.shape[2]} {images.shape[1]} 255\n".encode()
    return Dataset.from_dict(
        {"image": [{"bytes": header + image.tobytes(), "path": None} for image in images], "label": labels},
        features=Features({"image": Image(), "label": ClassLabel(names=names)}),
    )


def _find(folder: Path, prefix: str, kind: str) -> Path | None:
    # Some copies write "train-images.idx3-ubyte".
    names = (f"{prefix}-{kind}", f"{prefix}-{kind.replace('-idx', '.idx')}")
    return next((path for name in names for end in ("", ".gz") if (path := folder / f"{name}{end}").is_file()), None)
