"""Pre-training by each pretext task, on real digits; and a run with a moving target that is resumed."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from bissl_hf import BYOLForPreTraining, TwoViewTransform, load_image_dataset
from bissl_hf.data.augment import EvalTransform
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.data.one_view import OneViewTransform
from bissl_hf.models.pretext import build_pretext_model
from bissl_hf.trainer.knn_check import KnnCheck
from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import PretextTrainingArguments

from ..conftest import TinyImages, tiny_resnet_config

SIZE = 16
WIDTHS = {"projection_dims": (64, 64)}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 4,
    "decoder_intermediate_size": 64,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": WIDTHS,
    "byol": {**WIDTHS, "predictor_dims": (64, 64), "ema_decay": 0.98},
    "vicreg": WIDTHS,
    "barlow_twins": WIDTHS,
    "mae": {**DECODER, "mask_ratio": 0.5, "positions": "sincos"},
}


def byol_trainer(folder: Path, **overrides: Any) -> PretextTrainer:
    torch.manual_seed(0)
    model = BYOLForPreTraining.from_backbone(
        ResNetModel(tiny_resnet_config()), projection_dims=(6, 5), predictor_dims=(6, 5), ema_decay=0.7,
        ema_schedule="cosine",
    )  # fmt: skip
    args = PretextTrainingArguments(
        str(folder), num_train_epochs=2, per_device_train_batch_size=8, save_strategy="steps", save_steps=1, seed=7,
        use_cpu=True, disable_tqdm=True, report_to="none", optim="sgd", learning_rate=0.05, save_total_limit=None,
        **overrides,
    )  # fmt: skip
    return PretextTrainer(model, args, train_dataset=TinyImages(20, pairs=True))


def test_the_target_moves_once_after_each_step_and_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    whole = byol_trainer(tmp_path / "whole")
    calls = []
    update = whole.model.update_target
    whole.model.update_target = lambda *place: (calls.append(place), update(*place))
    whole.train()
    assert calls == [(step, 4) for step in range(4)]
    resumed = byol_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    states = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(parameter.requires_grad for parameter in resumed.model.target.parameters())
    assert not torch.equal(states[0]["target.projection_head.0.weight"], states[0]["projection_head.0.weight"])


def trainer_for(task: str, folder: Path, steps: int) -> tuple[PretextTrainer, KnnCheck]:
    digits = load_image_dataset("digits")
    train, test = (DecodedImages.from_dataset(digits[split], image_size=SIZE) for split in ("train", "test"))
    torch.manual_seed(0)
    if task == "mae":
        config = ViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=SIZE,
            patch_size=4,
        )  # fmt: skip
        backbone, transform = ViTModel(config), OneViewTransform(SIZE, crop_scale=(0.6, 1.0), horizontal_flip=0.0)
        optimizer = {"optim": "adamw", "learning_rate": 5e-3, "warmup_steps": 100}
    else:
        backbone = ResNetModel(
            ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
        )
        transform = TwoViewTransform(
            SIZE, crop_scale=(0.4, 1.0), crop_ratio=(3 / 4, 4 / 3), horizontal_flip=0.0, blur=(0.0, 0.0),
            solarize=(0.0, 0.0), color_jitter=0.0, grayscale=0.0,
        )  # fmt: skip
        optimizer = {"optim": "adamw", "learning_rate": 2e-3}
    model = build_pretext_model(task, backbone, **SETTINGS[task])
    args = PretextTrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=128, save_strategy="no", use_cpu=True,
        disable_tqdm=True, report_to="none", **optimizer,
    )  # fmt: skip
    trainer = PretextTrainer(model, args, train_dataset=train.select(np.arange(len(train))), train_transform=transform)
    return trainer, KnnCheck(trainer, train, test, eval_transform=EvalTransform(SIZE), neighbors=5)


def accuracy(trainer: PretextTrainer, check: KnnCheck) -> float:
    """The accuracy of the check; for a ViT-MAE of the mean over patches, since its loss does not reach what the class
    token says of an image."""
    if trainer.model.base_model_prefix == "backbone":
        return check.measure()["knn_accuracy"]
    with mock.patch(
        "bissl_hf.models.backbone.pool_features",
        lambda outputs, *, class_token: outputs.last_hidden_state[:, 1:].mean(dim=1),
    ):
        return check.measure()["knn_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "steps", "points"),
    [
        ("simclr", 60, 0.04),
        ("byol", 150, 0.02),
        ("vicreg", 60, 0.01),
        ("barlow_twins", 150, 0.01),
        ("mae", 500, 0.08),
    ],
)
def test_pre_training_raises_nearest_neighbour_accuracy(task: str, steps: int, points: float, tmp_path: Path) -> None:
    """Of five neighbours on the 360 test digits, above that of the random weights it starts from."""
    trainer, check = trainer_for(task, tmp_path, steps)
    before = accuracy(trainer, check)
    trainer.train()
    after = accuracy(trainer, check)
    print(f"{task}: {before:.3f} -> {after:.3f}")
    assert after >= before + points
