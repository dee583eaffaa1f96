"""The layout of images in memory: results, resumed runs and what is written are as without it."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.models.memory_format import to_channels_last
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer
from bissl_hf.trainer.joint_trainer import JointTrainer
from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import FineTuningArguments, JointTrainingArguments, PretextTrainingArguments

from ..conftest import TinyImages, tiny_model
from .trainers import all_equal, make_trainer, momenta, same_tensors


def is_channels_last(tensor: torch.Tensor) -> bool:
    """Whether a tensor has this layout and not that of the default."""
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def colour_model() -> BiSSLModel:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=3)
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(6, 5)))
    return BiSSLModel.from_models(lower, ResNetForImageClassification(config))


def in_three_channels(inputs: dict[str, Any], key: Any) -> dict[str, Any]:
    pixels = inputs["pixel_values"]  # (..., 1, height, width)
    factors = torch.tensor([1.0, 0.5, -1.0], dtype=pixels.dtype).view(3, 1, 1)
    return {**inputs, "pixel_values": pixels * factors}


def colour_trainer(folder, *, dtype=torch.float32, **settings):
    transforms = dict.fromkeys(("train_transform", "lower_transform", "eval_transform"), in_three_channels)
    return make_trainer(folder, model=colour_model().to(dtype), dtype=dtype, keywords=transforms, **settings)


def uses_channels_last(model: nn.Module) -> bool:
    """Whether the weights of convolutions of more than one channel and pixel have the layout."""
    weights = [p for p in model.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return bool(weights) and all(is_channels_last(weight) for weight in weights)


def layouts_of_convolutions(model: nn.Module) -> list[bool]:
    """Fills a list with whether each output of a convolution has its channels last, while the model runs."""
    found: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda module, inputs, output: found.append(is_channels_last(output)) if output.shape[-1] > 1 else None
            )
    return found


def test_weights_of_convolutions_change_their_layout_and_nothing_else():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv3d(2, 4, 3), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    to_channels_last(model)
    assert [is_channels_last(p) for p in parameters] == [p.ndim == 4 for p in parameters]
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert same_tensors(before, model.state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"lower_optim": "lars", "lower_learning_rate": 1.0},
        {"curvature_kind": "gauss_newton"},
        {"solver": "recycled", "curvature_mode": "recompute"},
        {"solver": "mfac"},
    ],
    ids=lambda settings: ",".join(map(str, settings.values())),
)
def test_both_levels_agree_with_the_default_layout_in_float64(tmp_path, settings):
    plain = colour_trainer(tmp_path / "plain", dtype=torch.float64, **settings)
    other = colour_trainer(tmp_path / "other", dtype=torch.float64, channels_last=True, **settings)
    start = {name: value.clone() for name, value in plain.model.state_dict().items()}
    used = {level: layouts_of_convolutions(getattr(other.model, level)) for level in ("lower", "upper")}
    unused = layouts_of_convolutions(plain.model)
    plain.train()
    other.train()
    assert all(found and all(found) for found in used.values())
    assert unused
    assert not any(unused)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-8, atol=1e-10)
    assert not same_tensors(start, plain.model.state_dict()), "training must move the model"


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_same_run(tmp_path, step):
    settings = {"channels_last": True, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = colour_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = colour_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert same_tensors(whole.model.state_dict(), resumed.model.state_dict())
    for level in ("lower", "upper"):
        assert all_equal(*(momenta(getattr(run.two_level_optimizer, level)) for run in (whole, resumed)))
    assert uses_channels_last(resumed.model)


def test_what_is_written_is_in_the_default_layout(tmp_path):
    trainer = colour_trainer(tmp_path, channels_last=True)
    trainer.train()
    trainer.save_model()
    expected = trainer.aligned_model().state_dict()
    written = load_file(tmp_path / "model.safetensors")
    assert all(value.is_contiguous() for value in written.values())
    assert all(torch.equal(written[name], expected[name]) for name in written)
    both = BiSSLModel.from_pretrained(tmp_path / "bilevel")
    assert same_tensors(both.state_dict(), trainer.model.state_dict())
    assert all(p.is_contiguous() for p in both.parameters())


BASIC: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}


@pytest.mark.parametrize(
    "build",
    [
        lambda folder: PretextTrainer(
            tiny_model().lower,
            PretextTrainingArguments(folder, per_device_train_batch_size=8, channels_last=True, **BASIC),
            train_dataset=TinyImages(16, pairs=True),
        ),
        lambda folder: FineTuneTrainer(
            model=tiny_model().upper,
            args=FineTuningArguments(folder, per_device_train_batch_size=8, channels_last=True, **BASIC),
            train_dataset=TinyImages(16),
        ),
        lambda folder: JointTrainer(
            tiny_model(),
            JointTrainingArguments(
                folder, per_device_train_batch_size=8, per_device_labelled_batch_size=8, channels_last=True, **BASIC
            ),
            train_dataset=TinyImages(16),
            lower_dataset=TinyImages(16, pairs=True),
        ),
    ],
    ids=["pretext", "finetune", "joint"],
)
def test_every_trainer_takes_it(tmp_path, build):
    trainer = build(str(tmp_path))
    assert uses_channels_last(trainer.model)
