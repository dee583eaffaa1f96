"""Pre-training as users start it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import ResNetForImageClassification

from bissl_hf import SimCLRForPreTraining
from bissl_hf.cli import pretrain

from . import runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    ResNetForImageClassification(runs.resnet_config()).save_pretrained(folder)
    return folder


def settings(images: Path, backbone: Path, output: Path, **changes: Any) -> list[str]:
    return runs.as_arguments(
        {
            "dataset": images,
            "knn_dataset": images,
            "knn_every": 2,
            "backbone": backbone,
            "projection_dims": [6, 5],
            "image_size": 16,
            "output_dir": output,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 12,
            "per_device_eval_batch_size": 12,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(images: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a run, and what the run printed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, runs.printed_by(pretrain.main, settings(images, backbone, output))


def test_a_run_leaves_a_model_its_curves_and_a_summary(finished: tuple[Path, str]) -> None:
    output, printed = finished
    model = SimCLRForPreTraining.from_pretrained(output)
    assert model.config.projection_dims == [6, 5]
    assert (output / "preprocessor_config.json").is_file()
    assert (output / "figures" / "pretraining.png").stat().st_size > 5000
    results = json.loads((output / "all_results.json").read_text())
    assert results["train_steps"] == 9
    assert [row["epoch"] for row in results["log_history"] if "knn_accuracy" in row] == [2, 3]
    assert [row["epoch"] for row in results["log_history"] if "loss" in row] == [1, 2, 3]
    assert re.search(rf"pretext loss +[\d.]+ +{results['train_loss']:.4f}\n", printed)
    assert re.search(rf"kNN accuracy +[\d.]+% +{results['knn_accuracy']:.2%}\n", printed)
    assert f"bissl-hf align --lower_model {output}" in printed


def test_the_model_card_says_what_the_run_has_shown(finished: tuple[Path, str], images: Path) -> None:
    output, _ = finished
    results = json.loads((output / "all_results.json").read_text())
    card = ModelCard.load(output / "README.md")
    assert card.data.to_dict() == {
        "library_name": "bissl_hf",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["simclr", "self-supervised-learning", "bissl"],
    }
    assert f"{results['knn_accuracy']:.1%} at the last" in card.text
    assert "(figures/pretraining.png)" in card.text
    assert "| Pretext task | a folder of images | 36 |" in card.text
    assert str(images) not in str(card)


def test_an_interrupted_run_ends_with_the_same_weights(
    finished: tuple[Path, str], images: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    cut = shutil.copytree(output, tmp_path / "out")
    shutil.rmtree(cut / "checkpoint-9")
    for name in ("model.safetensors", "all_results.json"):
        (cut / name).unlink()
    assert (cut / "checkpoint-6").is_dir()
    pretrain.main(settings(images, backbone, cut, resume_from_checkpoint=True))
    assert (cut / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    pretrain.main(settings(images, backbone, cut, resume_from_checkpoint=True))
    assert "This run is finished already" in capsys.readouterr().out


def test_it_starts_from_the_backbone_it_is_given(images: Path, backbone: Path, tmp_path: Path) -> None:
    """At a learning rate of 0 the weights stay; the labelled images of the check are not needed."""
    changes = {"learning_rate": 0.0, "weight_decay": 0.0, "num_train_epochs": 1, "knn_dataset": None}
    pretrain.main(settings(images, backbone, tmp_path / "out", **changes))
    trained = dict(SimCLRForPreTraining.from_pretrained(tmp_path / "out").backbone.named_parameters())
    given = ResNetForImageClassification.from_pretrained(backbone).base_model
    assert all(torch.equal(trained[name], value) for name, value in given.named_parameters())
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["knn_accuracy"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digitz"}, "There is no data set 'digitz'"),
        ({"knn_dataset": "digitz"}, "There is no data set 'digitz'"),
        ({"knn_every": 0}, "knn_every is 0; it must be at least 1"),
        ({"knn_images": 0}, "knn_images is 0; it must be at least 1"),
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size is 1; SimCLR compares images"),
        ({"per_device_train_batch_size": 37}, "batch of 37, and train_dataset has 36 examples"),
        ({"train_examples": 9}, "train_examples is 9, but pre-training uses no labels and all images; leave it out"),
        ({"license": "mine"}, "license is 'mine'"),
        ({"crop_scale": [0.5]}, "crop_scale is .* two numbers"),
        ({"optim": "lbfgs"}, "optim is 'lbfgs'"),
        (
            {"max_steps": 2, "warmup_steps": 50},
            "The warm-up for lr_scheduler_type has 50 steps; it must fit into the 2",
        ),
        ({"num_train_epochs": float("nan")}, "num_train_epochs is 'nan'; it must be a number"),
        ({"learning_rat": 1}, "Unknown argument --learning_rat; did you mean learning_rate"),
        ({"lower_model": "no/such/folder"}, "lower_model is 'no/such/folder'; there is no such folder. It must"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(
    changes: dict[str, Any],
    message: str,
    images: Path,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = runs.refusal(capsys, pretrain.main, settings(images, backbone, tmp_path / "out", **changes))
    assert re.search(message, error), error
