"""The Python example of README.md, run as it stands there on a tiny backbone and a few pictures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from transformers import ResNetModel, pipeline

from bissl_hf import BiSSLTrainer, BiSSLTrainingArguments

from .conftest import tiny_resnet_config

PAGE = Path(__file__).parent.parent / "README.md"
# Everything that only decides how long the run is.
SHORT = {
    "num_alternations": 1, "lower_steps": 2, "upper_steps": 1, "head_warmup_epochs": 1, "save_strategy": "no",
    "per_device_lower_batch_size": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


def write_pictures(folder: Path, count: int, brightness: int) -> None:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(brightness)
    for number in range(count):
        pixels = generator.integers(0, 40, (16, 16, 3)) + brightness
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


def test_the_python_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = (
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL) if "task" in text
    )
    assert len([line for line in block.splitlines() if line]) <= 10
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("dark", "bright")):
        write_pictures(Path("path/to/images") / name, 6, 20 + 160 * number)
    write_pictures(Path("path/to/unlabelled"), 8, 90)
    torch.manual_seed(0)
    config = tiny_resnet_config()
    config.num_channels = 3
    ResNetModel(config).save_pretrained("microsoft/resnet-18")  # a folder of this name goes before the Hub

    whole = BiSSLTrainingArguments.__post_init__

    def shortened(args: BiSSLTrainingArguments) -> None:
        vars(args).update(SHORT)
        whole(args)

    monkeypatch.setattr(BiSSLTrainingArguments, "__post_init__", shortened)
    space: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), space)
    assert 0 <= float(capsys.readouterr().out.splitlines()[-1]) <= 1
    classify = pipeline("image-classification", "aligned")
    assert {found["label"] for found in classify("path/to/images/dark/0.png")} == {"dark", "bright"}
    assert isinstance(space["trainer"], BiSSLTrainer)
    assert any("eval_accuracy" in row for row in space["trainer"].state.log_history)
