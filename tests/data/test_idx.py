"""IDX files written by hand come back pixel by pixel; broken ones are refused."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from bissl_hf.data import catalogue
from bissl_hf.data.idx import read_idx
from bissl_hf.data.sources import load_image_dataset

PIXELS = {"train": np.random.default_rng(0).integers(0, 256, (40, 5, 7), dtype=np.uint8)}
PIXELS["t10k"] = PIXELS["train"][::-2]
LABELS = {"train": np.arange(40, dtype=np.uint8) % 4, "t10k": (np.arange(40, dtype=np.uint8) % 4)[::-2]}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", size) for size in array.shape) + array.tobytes()


def write_idx_folder(folder: Path, *, suffix: str = "", separator: str = "-") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix in ("train", "t10k"):
        for kind, array in ((f"images{separator}idx3", PIXELS[prefix]), (f"labels{separator}idx1", LABELS[prefix])):
            content = gzip.compress(idx(array)) if suffix else idx(array)
            (folder / f"{prefix}-{kind}-ubyte{suffix}").write_bytes(content)
    return folder


@pytest.mark.parametrize(("suffix", "separator"), [("", "-"), (".gz", "-"), ("", ".")])
def test_folder_has_its_images_and_labels(tmp_path, suffix, separator):
    loaded = load_image_dataset(write_idx_folder(tmp_path / "x", suffix=suffix, separator=separator))
    assert {split: len(dataset) for split, dataset in loaded.items()} == {"train": 36, "validation": 4, "test": 20}
    test = loaded["test"]
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in test["image"]]), PIXELS["t10k"])
    np.testing.assert_array_equal(test["label"][:], LABELS["t10k"])
    assert test.features["label"].names == ["0", "1", "2", "3"]


def test_folder_of_training_files_alone(tmp_path):
    folder = write_idx_folder(tmp_path)
    for path in folder.glob("t10k*"):
        path.unlink()
    loaded = load_image_dataset(folder)
    assert sum(map(len, loaded.values())) == 40


def test_folder_that_bears_a_name_of_the_catalogue_has_its_classes(tmp_path, monkeypatch):
    folder = write_idx_folder(tmp_path / "Fashion-MNIST", suffix=".gz")
    with pytest.raises(ValueError, match=r"'train' in .* hold 40 images; Fashion-MNIST, whose name .* has 60000"):
        load_image_dataset(folder)
    monkeypatch.setitem(catalogue.CATALOGUE["fashion_mnist"].rows, "train", 40)
    monkeypatch.setitem(catalogue.CATALOGUE["fashion_mnist"].rows, "test", 20)
    names = load_image_dataset(folder)["train"].features["label"].names
    assert (len(names), names[0], names[9]) == (10, "T-shirt/top", "Ankle boot")


def test_labels_are_missing(tmp_path):
    folder = write_idx_folder(tmp_path)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"The labels train-labels-idx1-ubyte \(or \.gz\) are missing in"):
        load_image_dataset(folder)


def test_labels_of_another_number(tmp_path):
    folder = write_idx_folder(tmp_path)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS["train"]))
    with pytest.raises(ValueError, match=r"holds 20 images and .* 40 labels; they must be as many"):
        load_image_dataset(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx(PIXELS["train"])[:-1], r"holds 1399 bytes of data; its shape \(40, 5, 7\) needs 1400"),
        (idx(LABELS["train"]), "no IDX file of unsigned bytes in 3 dimensions: it starts with 00 00 08 01"),
        (b"", "it starts with nothing, which must be 00 00 08 03"),
    ],
)
def test_broken_files(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path, dimensions=3)


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(idx(PIXELS["train"]))[:60]], ids=["none", "cut"])
def test_broken_gzip(tmp_path, content):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"The IDX file .*\.gz' cannot be read"):
        read_idx(path, dimensions=3)
