"""Images are read as training reads them, whatever their mode, name or damage."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from bissl_hf.cli.predict import main, read_batches
from bissl_hf.data.augment import image_processor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=2)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    image_processor(8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def grey(high: float, mode: str) -> Image.Image:
    values = np.linspace(0, high, 64).reshape(8, 8)
    return Image.fromarray(values.astype("float32" if mode == "F" else "uint16"))


def test_deep_and_float_images_are_scaled_as_in_training(tmp_path: Path) -> None:
    usual = np.round(np.linspace(0, 255, 64)).astype("uint8").reshape(8, 8)
    grey(1.0, "F").save(tmp_path / "fractions.tif")
    grey(65535, "I;16").save(tmp_path / "deep.png")
    files = [tmp_path / "fractions.tif", tmp_path / "deep.png"]
    ((read, images),) = read_batches(files, 4, {})
    assert read == files
    for image in images:
        np.testing.assert_allclose(np.asarray(image)[:, :, 0].astype(int), usual, atol=1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_odd_names_and_damage_are_told_and_do_not_end_it(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.new("RGB", (8, 8), (200, 20, 20))
    not_utf8 = os.fsencode(folder) + b"/caf\xe9.png"
    picture.save(folder / "good.png")
    os.rename(folder / "good.png", not_utf8)
    picture.save(folder / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(60)))
    (folder / "\x1b[2Jbad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    main(["--model", str(model), "--inputs", str(folder), "--output", str(tmp_path / "out.csv"), "--use_cpu", "true"])
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        rows = list(csv.DictReader(stream))
    assert {os.fsencode(row["file"]) for row in rows} == {not_utf8, os.fsencode(folder / "exif.jpg")}
    shown = capsys.readouterr()
    assert "1 could not be read" in shown.err
    assert r"\x1b[2Jbad.png: " in shown.err
    assert "\x1b[2J" not in shown.out + shown.err


def test_processes_of_a_launcher_are_refused(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # of a launcher that counts on GPUs
    with pytest.raises(SystemExit):
        main(["--model", str(model), "--inputs", str(tmp_path), "--output", str(tmp_path / "out.csv")])
    assert "error: predict runs on 2 processes; start it on one" in capsys.readouterr().err
