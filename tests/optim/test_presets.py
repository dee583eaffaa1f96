"""Which optimizer a backbone gets."""

from dataclasses import fields

import pytest
import transformers as tf

from bissl_hf import BiSSLTrainingArguments, SimCLRConfig
from bissl_hf.optim.optimizers import resolve_optimizer
from bissl_hf.optim.presets import ADAMW, PAPER, optimizer_preset


@pytest.mark.parametrize(
    "config",
    [
        tf.ResNetConfig(),
        tf.RegNetConfig(),
        tf.EfficientNetConfig(),
        tf.MobileNetV2Config(),
        tf.TimmWrapperConfig(architecture="resnet50"),
        tf.TimmWrapperConfig(architecture="efficientnet_b0"),
    ],
)
def test_networks_with_batch_norm_keep_the_papers(config: tf.PretrainedConfig) -> None:
    assert optimizer_preset(config) == dict(PAPER)


@pytest.mark.parametrize(
    "config",
    [
        tf.ViTConfig(),
        tf.Dinov2Config(),
        tf.Dinov2WithRegistersConfig(),
        tf.DINOv3ViTConfig(),
        tf.SwinConfig(),
        tf.ConvNextV2Config(),
        tf.ViTMAEConfig(),
        tf.TimmWrapperConfig(architecture="vit_small_patch14_dinov2"),
        tf.TimmWrapperConfig(architecture="convnext_tiny"),
    ],
)
def test_others_get_adamw(config: tf.PretrainedConfig) -> None:
    assert optimizer_preset(config) == dict(ADAMW)


def test_a_pretext_model_has_its_backbones() -> None:
    vit = tf.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    assert optimizer_preset(SimCLRConfig(backbone_config=vit)) == dict(ADAMW)
    assert optimizer_preset(SimCLRConfig()) == dict(PAPER)


@pytest.mark.parametrize("preset", [PAPER, ADAMW])
def test_presets_are_fields_with_optimizers_that_exist(preset: dict) -> None:
    known = {field.name: field.default for field in fields(BiSSLTrainingArguments)}
    assert set(preset) <= set(known)
    for name in ("optim", "lower_optim"):
        resolve_optimizer(preset[name], field=name)
    if preset is PAPER:
        assert {name: known[name] for name in preset} == dict(preset)
