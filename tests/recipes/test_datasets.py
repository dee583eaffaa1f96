"""Recipes on data sets of the catalogue, from a stand-in for the Hub."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

from bissl_hf import load_image_dataset
from bissl_hf.cli import align, finetune
from bissl_hf.data.augment import EvalTransform
from bissl_hf.data.catalogue import CATALOGUE
from bissl_hf.data.decoded import DecodedImages
from tests.data.hub_parquet import make_split, png, serve
from tests.hub_stand_in import HubStandIn
from tests.recipes.runs import as_arguments

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        yield hub


def tiny_config() -> ResNetConfig:
    return ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")


def settings(folder: Path, **changes: Any) -> list[str]:
    """A short run on a tiny backbone."""
    tiny_config().save_pretrained(folder / "backbone")
    values = {
        "backbone": folder / "backbone",
        "backbone_init": "random",
        "projection_dims": "6 5",
        "image_size": 8,
        "output_dir": folder / "out",
        "num_alternations": 1,
        "lower_steps": 1,
        "upper_steps": 1,
        "per_device_lower_batch_size": 16,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 500,
        "pretrain_steps": 2,
        "head_warmup_epochs": 1,
        "bn_recalibration_images": 32,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", *str(value).split())]


@pytest.mark.slow
def test_stl10_with_all_its_images_through_the_launcher(hub: HubStandIn, tmp_path: Path) -> None:
    """The real number of images, of 8x8 pixels: 5,000, 8,000 and 100,000 without labels."""
    entry = CATALOGUE["stl10"]
    splits = {
        split: make_split(entry, rows, labelled=split != "unlabeled", side=8) for split, rows in entry.rows.items()
    }
    serve(hub, entry, splits, also={f"train_{fold}": make_split(entry, 3) for fold in range(10)})
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"), str(ROOT / "recipes/bissl.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **hub.environment(tmp_path / "home")}
    done = subprocess.run(
        [*launcher, *settings(tmp_path, dataset="stl10")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Decoding unlabelled" in done.stderr
    assert "top 5" in done.stdout
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert 0 <= results["test_accuracy"] <= results["test_top5_accuracy"] <= 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label[3] == "class 3"


def test_voc2007_with_several_classes_per_image(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = replace(CATALOGUE["voc2007"], rows={"train": 80, "test": 40})
    monkeypatch.setitem(CATALOGUE, "voc2007", entry)
    serve(hub, entry, {split: make_split(entry, rows, side=8) for split, rows in entry.rows.items()})
    hub.patch(monkeypatch, tmp_path / "home")
    align.main(settings(tmp_path, dataset="voc2007", head_warmup_epochs=30, learning_rate=0.1))
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert "11-point mAP" in printed
    assert re.search(rf"test +after: aligned +\d+ +{100 * results['test_map']:.2f} %", printed)
    assert "test_accuracy" not in results
    # Guessing gives 0.1: two of twenty classes are there.
    assert results["before_map"] > 0.15
    config = AutoModelForImageClassification.from_pretrained(tmp_path / "out").config
    assert config.problem_type == "multi_label_classification"


def map_by_hand(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean over classes of the 11-point interpolated average precision, counted threshold by threshold."""
    means = []
    for scored, present in zip(scores.T.tolist(), labels.T.tolist(), strict=True):
        points = []  # (recall, precision) of the images that score at least as much as each of them
        for threshold in scored:
            taken = [truth for score, truth in zip(scored, present, strict=True) if score >= threshold]
            points.append((sum(taken) / sum(present), sum(taken) / len(taken)))
        # A recall of 3/10 is one of 0.3.
        best = [max(precision for recall, precision in points if recall >= t / 10 - 1e-9) for t in range(11)]
        means.append(sum(best) / 11)
    return sum(means) / len(means)


def test_voc2007_is_fine_tuned_and_searched_by_its_map(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = replace(CATALOGUE["voc2007"], rows={"train": 80, "test": 40})
    monkeypatch.setitem(CATALOGUE, "voc2007", entry)
    splits = {split: make_split(entry, rows, side=8) for split, rows in entry.rows.items()}
    serve(hub, entry, splits)
    hub.patch(monkeypatch, tmp_path / "home")
    ResNetForImageClassification(tiny_config()).save_pretrained(tmp_path / "backbone")
    output = tmp_path / "out"
    options = {
        "dataset": "voc2007", "model": tmp_path / "backbone", "image_size": 8, "output_dir": output, "seeds": 2,
        "search_trials": 2, "num_train_epochs": 3, "per_device_train_batch_size": 20, "learning_rate": 0.1,
        "per_device_eval_batch_size": 16, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    finetune.main(as_arguments(options))
    printed = capsys.readouterr().out
    results = json.loads((output / "all_results.json").read_text())
    assert "test_accuracy" not in results
    trials = results["search"]
    best = max(trials, key=lambda trial: (trial["eval_map"], -trial["eval_loss"]))
    assert len({trial["eval_map"] for trial in trials}) == 2, "the pairs differ, so there was a choice"
    assert (results["learning_rate"], results["weight_decay"]) == (best["learning_rate"], best["weight_decay"])

    test = DecodedImages.from_dataset(load_image_dataset("voc2007")["test"], image_size=8)
    rows = [test[row] for row in range(len(test))]
    inputs = EvalTransform(8)({"pixel_values": torch.stack([row["pixel_values"] for row in rows])}, (0,))
    labels = np.stack([row["labels"] for row in rows])
    assert labels.shape == (40, 20)
    assert (labels.sum(1) == 2).all()
    for seed, value in zip(results["seeds"], results["test_map"]["values"], strict=True):
        model = AutoModelForImageClassification.from_pretrained(output / f"seed-{seed}" / "model").eval()
        assert model.config.problem_type == "multi_label_classification"
        with torch.no_grad():
            scores = model(**inputs).logits.numpy()
        assert value == pytest.approx(map_by_hand(scores, labels), abs=1e-6)
    assert re.search(rf"test +11-point mAP +\d+ +{100 * results['test_map']['mean']:.2f} %", printed)


def test_duplicates_of_test_images_are_left_out_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    colors = {"train": range(32), "test": range(100, 108), "unlabeled": range(90, 120)}
    for split, values in colors.items():
        for value in values:
            place = folder / split / ("" if split == "unlabeled" else "ab"[value % 2])
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{value}.png").write_bytes(png(value, side=8))
    with pytest.raises(SystemExit):
        align.main(settings(tmp_path, dataset=folder, drop_test_duplicates=True, per_device_lower_batch_size=23))
    # 30 unlabelled images, 8 of which are test images.
    assert "makes a batch of 23, and lower_dataset has 22 examples" in capsys.readouterr().err
