"""The Python code of README.md and of the documentation runs as it stands, but for sizes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetForImageClassification

from bissl_hf import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.data.augment import image_processor

from ..conftest import TinyImages, tiny_model
from ..recipes.runs import resnet_config
from .pages import PAGES, Block, blocks, name_of

# Pages with data of their own have a test of their own.
_ELSEWHERE = ("docs/new_pretext_task.md", "docs/text.md")
SIZE = 16
_SMALLER = {
    "num_alternations": 1,
    "lower_steps": 1,
    "upper_steps": 1,
    "head_warmup_epochs": 1,
    "max_steps": 2,
    "num_train_epochs": 1,
    "per_device_lower_batch_size": 8,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 64,
}


def shrink(code: str) -> str:
    """Code with small sizes in the place of its own, and on the CPU."""
    code = re.sub(r"\b224\b", str(SIZE), code)
    for name, value in _SMALLER.items():
        code = re.sub(rf"\b{name}=\d+", f"{name}={value}", code)
    expected = ("lower_steps", "upper_steps", "head_warmup_epochs", "per_device_lower_batch_size")
    missing = [name for name in expected if name not in code]
    added = "".join(f", {name}={_SMALLER[name]}" for name in missing)
    return re.sub(r"\b(num_alternations=\d+)", rf"\1{added}, use_cpu=True", code)


def write_images(folder: Path, number: int, *, seed: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for index in range(number):
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders that pages name; those of the Hub's models are read as folders."""
    monkeypatch.chdir(tmp_path)
    for root in ("path/to/images", "my_images"):
        for seed, name in enumerate(("cat", "dog")):
            write_images(tmp_path / root / name, 20, seed=seed)
    for root in ("path/to/unlabelled", "my_unlabelled", "new_images"):
        write_images(tmp_path / root, 12, seed=2)
    Image.new("RGB", (30, 20)).save(tmp_path / "new_images" / "one.jpg")
    torch.manual_seed(0)
    config = resnet_config(num_labels=2)
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(6, 5)))
    upper = ResNetForImageClassification(config)
    for name in ("microsoft/resnet-18", "user/name", "outputs/digits", "outputs/tuned"):
        upper.save_pretrained(tmp_path / name)
        image_processor(SIZE).save_pretrained(tmp_path / name)
    lower.save_pretrained(tmp_path / "user/simclr")
    BiSSLModel.from_models(lower, upper).save_pretrained(tmp_path / "user/name/bilevel")
    return tmp_path


def trainer_in(folder: str) -> BiSSLTrainer:
    """The trainer that a page may take for granted."""
    args = BiSSLTrainingArguments(folder, num_alternations=1, per_device_lower_batch_size=4, use_cpu=True)
    data = {"train_dataset": TinyImages(8), "lower_dataset": TinyImages(8, pairs=True)}
    return BiSSLTrainer(tiny_model(), args, **data)


def test_code_is_run_or_says_why_not() -> None:
    skipped = {str(block): block.reason for page in PAGES for block in blocks(page, "python") if block.reason}
    assert len(skipped) <= 1, skipped


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python") and name_of(page) not in _ELSEWHERE], ids=name_of
)
def test_the_code_of_a_page(page: Path, workspace: Path) -> None:
    space: dict[str, Any] = {"__name__": "__main__", "trainer": trainer_in("outputs/run")}
    for block in blocks(page, "python"):
        if block.reason is None:
            exec(compile(lined_up(block), block.page, "exec"), space)


def lined_up(block: Block) -> str:
    """The code of a block, on the lines of its page."""
    return "\n" * (block.line - 1) + shrink(block.code)
