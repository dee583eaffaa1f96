"""What is shared where one level freezes what the other trains."""

import copy
import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, ResNetForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging as transformers_logging

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.models.mae import mae_from_backbone

from ..conftest import tiny_resnet_config

VIT = ViTConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
    num_labels=3,
)  # fmt: skip
POSITIONS = "embeddings.position_embeddings"


@pytest.fixture(autouse=True)
def propagate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loggers of transformers keep their messages to themselves otherwise."""
    monkeypatch.setattr(transformers_logging._get_library_root_logger(), "propagate", True)


def resnet_pair() -> tuple[SimCLRForPreTraining, PreTrainedModel]:
    torch.manual_seed(0)
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny_resnet_config(), projection_dims=(6, 5)))
    return lower, ResNetForImageClassification(tiny_resnet_config())


def test_positions_fixed_in_a_vit_mae_belong_to_the_vit(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    torch.manual_seed(0)
    upper = ViTForImageClassification(VIT)
    with torch.no_grad():
        upper.vit.embeddings.position_embeddings.normal_()
    lower = mae_from_backbone(upper, decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    with torch.no_grad():
        lower.vit.embeddings.position_embeddings += 1
    with caplog.at_level(logging.WARNING):
        model = BiSSLModel.from_models(lower, upper)
    assert [r.message for r in caplog.records] == [
        f"Only the upper model trains {POSITIONS}: it is its own, and no part of the shared backbone."
    ]
    assert POSITIONS not in model.shared_parameter_names
    own, other = model.upper.vit.embeddings.position_embeddings, model.lower.vit.embeddings.position_embeddings
    assert any(parameter is own for parameter in model.head_parameters("upper"))
    assert not any(parameter is other for parameter in model.head_parameters("lower"))
    assert torch.equal(own, other)  # it starts from what the backbone has learnt with

    with torch.no_grad():
        own += 1
    assert torch.equal(model.aligned_model().vit.embeddings.position_embeddings, own)  # and is exported as trained
    caplog.clear()
    model.save_pretrained(tmp_path)
    loaded = BiSSLModel.from_pretrained(tmp_path)
    assert loaded.shared_parameter_names == model.shared_parameter_names
    assert caplog.records == []  # reported once


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_part_of_a_backbone_that_one_level_freezes(level: str, caplog: pytest.LogCaptureFixture) -> None:
    lower, upper = resnet_pair()
    frozen = lower if level == "lower" else upper
    frozen.base_model.embedder.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        model = BiSSLModel.from_models(lower, upper)
    trains = {"lower": "upper", "upper": "lower"}[level]
    assert f"Only the {trains} model trains embedder.embedder.convolution.weight" in caplog.text
    names = {name for name, _ in lower.base_model.named_parameters()}
    assert set(model.shared_parameter_names) == {name for name in names if not name.startswith("embedder.")}
    heads = {id(p) for p in model.head_parameters(trains)}
    assert heads >= {id(p) for p in getattr(model, trains).base_model.embedder.parameters()}


def test_frozen_backbones_are_called_frozen() -> None:
    for levels, said in ((("lower",), "lower"), (("upper",), "upper"), (("lower", "upper"), "lower and of the upper")):
        pair = dict(zip(("lower", "upper"), resnet_pair(), strict=True))
        for level in levels:
            pair[level].base_model.requires_grad_(False)
        with pytest.raises(
            ValueError, match=rf"in common: that of the {said} model is frozen\..*requires_grad_\(True"
        ):
            BiSSLModel.from_models(pair["lower"], pair["upper"])


def test_levels_that_train_different_parts() -> None:
    lower, upper = resnet_pair()
    lower.base_model.embedder.requires_grad_(False)
    upper.base_model.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="each trains another part"):
        BiSSLModel.from_models(lower, upper)


def test_another_shape_and_a_missing_parameter_are_refused_still() -> None:
    lower, _ = resnet_pair()
    for change in ({"hidden_sizes": [4, 6]}, {"depths": [1, 2]}):
        config = copy.deepcopy(tiny_resnet_config())
        config.update(change)
        upper = ResNetForImageClassification(config)
        upper.base_model.embedder.requires_grad_(False)
        with pytest.raises(ValueError, match=r"The two backbones are not the same; only in the .*, or shaped differ"):
            BiSSLModel.from_models(lower, upper)
