"""The recipe of alignment with LoRA adapters on a tiny DINOv2."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2Model

from bissl_hf import BiSSLModel
from bissl_hf.cli import align

from .runs import as_arguments, write_splits

TINY = {
    "image_size": 28, "projection_dims": [6, 5], "num_alternations": 1, "lower_steps": 2, "upper_steps": 1,
    "per_device_lower_batch_size": 8, "per_device_train_batch_size": 8, "head_warmup_epochs": 1, "lora_rank": 2,
    "lower_optim": "adamw", "optim": "adamw", "use_cpu": True, "disable_tqdm": True, "report_to": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(root / "dino")
    return {**TINY, "dataset": write_splits(root / "images"), "backbone": root / "dino"}


def test_a_run_on_dinov2_with_adapters(given, tmp_path):
    output = tmp_path / "aligned"
    align.main(as_arguments({**given, "output_dir": output}))
    exported = AutoModelForImageClassification.from_pretrained(output)
    assert type(exported).__name__ == "Dinov2ForImageClassification"
    assert not [name for name in exported.state_dict() if "lora" in name]
    both = BiSSLModel.from_pretrained(output / "bilevel")
    assert len(both.shared_parameter_names) == 4
    assert "test_accuracy" in json.loads((output / "all_results.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target": ["nowhere"]}, "lora_target is 'nowhere', which is no layer with weights of Dinov2Model"),
        ({"lora_rank": 0}, "lora_rank is 0; it must be at least 1"),
        ({"pretrain_steps": 5}, "pretrain_steps is 5 and lora_rank is 2; adapters go on"),
        ({"lora_rank": None, "lora_alpha": 4}, "lora_alpha is 4, and lora_rank is not given"),
    ],
)
def test_refuses(given, changes, message, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        align.main(as_arguments({**given, "output_dir": tmp_path / "aligned", **changes}))
    assert message in capsys.readouterr().err
