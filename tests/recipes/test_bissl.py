"""The recipe as users start it: what it refuses, what it leaves behind, and that an interrupted run goes on."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from bissl_hf import SimCLRConfig, SimCLRForPreTraining
from recipes import bissl

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "bissl.py"
CLASSES = ("cat", "dog", "emu")
MODES = ("L", "RGB", "RGBA", "P")
SIZES = ((24, 18), (17, 30), (20, 20))


def resnet_config(depth: int = 1, num_labels: int = len(CLASSES)) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, depth], layer_type="basic", num_labels=num_labels
    )


def write_images(folder: Path, per_class: int, seed: int) -> None:
    """Writes PNG files of mixed modes and sizes; each class is noise around a brightness of its own."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            width, height = SIZES[(index + number) % len(SIZES)]
            low = 80 * number
            pixels = generator.integers(low, low + 90, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(MODES[index % len(MODES)]).save(folder / name / f"{index:02d}.png")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three splits: 36 training, 6 validation and 24 test images."""
    root = tmp_path_factory.mktemp("images")
    for seed, (split, per_class) in enumerate({"train": 12, "validation": 2, "test": 8}.items()):
        write_images(root / split, per_class, seed)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with tiny models: architecture only, pretext model, classifiers that fit and that do not."""
    root = tmp_path_factory.mktemp("models")
    resnet_config().save_pretrained(root / "backbone")
    config = SimCLRConfig(backbone_config=resnet_config(), projection_dims=(6, 5))
    SimCLRForPreTraining(config).save_pretrained(root / "simclr")
    ResNetForImageClassification(resnet_config()).save_pretrained(root / "classifier")
    ResNetForImageClassification(resnet_config(num_labels=4)).save_pretrained(root / "four_classes")
    ResNetForImageClassification(resnet_config(depth=2)).save_pretrained(root / "deeper")
    return root


def settings(images: Path, models: Path, output: Path, **changes: Any) -> list[str]:
    """The arguments of a run that is small and sound, with changes; `None` leaves an argument out."""
    values: dict[str, Any] = {
        "dataset": images,
        "backbone": models / "backbone",
        "backbone_init": "random",
        "projection_dims": [6, 5],
        "image_size": 16,
        "output_dir": output,
        "num_alternations": 2,
        "lower_steps": 2,
        "upper_steps": 2,
        "per_device_lower_batch_size": 12,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 12,
        "pretrain_steps": 4,
        "head_warmup_epochs": 2,
        "learning_rate": 0.05,
        "proximal_weight": 1.0,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    arguments: list[str] = []
    for name, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(item) for item in items)]
    return arguments


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


# What is refused


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Runs the recipe in this process; returns its one sentence after the checks that hold for every refusal."""
    with pytest.raises(SystemExit) as stop:
        bissl.main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Pre-training" not in out
    return err


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "digitz"}, "There is no data set 'digitz'.*Did you mean 'digits'"),
    ({"lower_dataset": "nowhere"}, "There is no data set 'nowhere'"),
    ({"image_column": "photo"}, r"no column 'photo'; its columns are \['image', 'label'\]: choose one with `image_co"),
    ({"label_column": "kind"}, r"no column 'kind'; its columns are \['image', 'label'\]: choose one with `label_colu"),
    ({"num_alternations": 0}, "num_alternations is 0; it must be a finite number of at least 1"),
    ({"num_alternations": -3}, "num_alternations is -3"),
    ({"lower_steps": 0}, "lower_steps is 0"),
    ({"upper_steps": -1}, "upper_steps is -1"),
    ({"solver_max_iterations": 0}, "solver_max_iterations is 0"),
    ({"image_size": 0}, "`image_size` is 0; it must be at least 2"),
    ({"image_size": -16}, "`image_size` is -16"),
    ({"per_device_lower_batch_size": 0}, "per_device_lower_batch_size is 0"),
    ({"per_device_lower_batch_size": 1}, "per_device_lower_batch_size is 1; SimCLR compares images"),
    ({"per_device_lower_batch_size": 37}, "batch of 37, and lower_dataset has 36 examples"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
    ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
    ({"curvature_batch_size": 40}, "curvature_batch_size makes a batch of 40"),
    ({"lower_micro_batch_size": 0}, "lower_micro_batch_size is 0"),
    ({"pretrain_steps": -1}, "pretrain_steps is -1; it must be at least 0"),
    ({"pretrain_batch_size": 37}, "batch of 37, and train_dataset has 36 examples"),
    ({"pretrain_batch_size": 1}, "pretrain_batch_size is 1; SimCLR compares images"),
    ({"pretrain_batch_size": 0}, "pretrain_batch_size is 0"),
    ({"pretrain_batch_size": -4}, "pretrain_batch_size is -4"),
    ({"pretrain_optim": "sgdd"}, "optim is 'sgdd'; it must be one of"),
    ({"pretrain_learning_rate": -1.0}, "learning_rate is -1.0"),
    ({"temperature": 0.0}, "temperature.* 0.0"),
    ({"projection_dims": [0]}, "projection_dims"),
    ({"crop_scale": [0.9, 0.1]}, r"`crop_scale` is \(0.9, 0.1\)"),
    ({"crop_scale": [0.5]}, "crop_scale"),
    ({"blur": [0.5]}, "`blur` is .*2 probabilities"),
    ({"horizontal_flip": 1.5}, "`horizontal_flip` is 1.5"),
    ({"proximal_weight": 0.0}, "proximal_weight is 0.0"),
    ({"learning_rate": "nan"}, "learning_rate is nan"),
    ({"solver": "lu"}, "solver is 'lu'; it must be one of cg"),
    ({"optim": "adamm"}, "optim is 'adamm'; it must be one of"),
    ({"lower_optim": "lbfgs"}, "lower_optim is 'lbfgs'"),
    ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type is 'zigzag'"),
    ({"lower_lr_scheduler_type": "zigzag"}, "lower_lr_scheduler_type is 'zigzag'"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2.*lower_micro_batch_size"),
    ({"fp16": True}, "fp16.*bf16"),
    ({"num_train_epochs": 7}, "num_train_epochs is 7.0 and num_alternations 2"),
    ({"lower_steps": "abc"}, "--lower_steps: invalid int value: 'abc'"),
    ({"lower_stepz": 3}, "Unknown argument --lower_stepz; did you mean lower_steps"),
    ({"seed": -1}, "seed.* -1"),
    ({"backbone_init": "zeros"}, "backbone_init is 'zeros'; it must be pretrained or random"),
    ({"backbone": "no/such/folder"}, "no/such/folder"),
    ({"resume_from_checkpoint": "no_such_checkpoint"}, "resume_from_checkpoint is no_such_checkpoint"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG_VALUES, ids=[f"{next(iter(c))}={next(iter(c.values()))}" for c, _ in WRONG_VALUES]
)
def test_refuses_wrong_values(
    changes: dict[str, Any],
    message: str,
    images: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refusal(capsys, settings(images, models, tmp_path / "out", **changes))
    with pytest.raises(RuntimeError, match=message):
        raise RuntimeError(error)
