"""Fine-tuning with LoRA: what moves, what is written, and a resume to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from bissl_hf.cli.adapters import LoraArguments
from bissl_hf.cli.models import StartArguments, classifier_builder
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer
from bissl_hf.trainer.training_args import FineTuningArguments

from ..conftest import TinyImages

ARGUMENTS: dict[str, Any] = {
    "use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 7, "max_steps": 2, "optim": "adamw",
    "learning_rate": 0.05, "per_device_train_batch_size": 6, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
        num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def make_trainer(vit: str, folder: Path) -> FineTuneTrainer:
    build = classifier_builder(StartArguments(model=vit), ["a", "b", "c"], lora=LoraArguments(lora_rank=2))
    torch.manual_seed(1)
    args = FineTuningArguments(output_dir=str(folder), **ARGUMENTS)
    return FineTuneTrainer(model=build(), args=args, train_dataset=TinyImages(12), eval_dataset=TinyImages(9))


def test_adapters_and_head_move_and_the_export_is_native(vit, tmp_path):
    trainer = make_trainer(vit, tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name or name.startswith("classifier.")}
    trainer.save_model(str(tmp_path / "model"))
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    assert not [name for name in exported.state_dict() if "lora" in name]
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(exported(images).logits, trainer.model.eval()(images).logits)
    assert "eval_loss" in trainer.evaluate()


def test_a_resumed_run_is_the_same_run(vit, tmp_path):
    whole, resumed = (make_trainer(vit, tmp_path / name) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    found = resumed.model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.model.state_dict().items())


def test_settings_of_adapters_without_a_rank_are_refused(vit):
    with pytest.raises(ValueError, match="lora_alpha is 4, and lora_rank is not given"):
        classifier_builder(StartArguments(model=vit), ["a", "b"], lora=LoraArguments(lora_alpha=4))
