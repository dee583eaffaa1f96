"""Models for images of another size."""

import json
from typing import Any

import pytest
import torch
import transformers as tf
from torch.nn import functional as F
from transformers import AutoModelForImageClassification

from bissl_hf import BiSSLConfig, BiSSLModel, BYOLForPreTraining, SimCLRForPreTraining
from bissl_hf.data.preprocessing import Preprocessing
from bissl_hf.models.image_size import adapt_image_size, own_preprocessing

VIT: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip


def classifier() -> tf.ViTForImageClassification:
    torch.manual_seed(0)
    model = tf.ViTForImageClassification(tf.ViTConfig(**VIT, num_labels=3)).eval()
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.normal_()
    return model


@pytest.mark.parametrize("size", [48, 16])
def test_positions_of_a_vit_are_interpolated(size: int, tmp_path) -> None:
    model = classifier()
    model.vit.embeddings.cls_token.requires_grad_(False)
    adapted = adapt_image_size(model, size)
    assert adapted.config.image_size == size
    assert model.config.image_size == 32
    table = model.vit.embeddings.position_embeddings
    grid = table[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(size // 8, size // 8), mode="bicubic", align_corners=False)
    expected = torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(adapted.vit.embeddings.position_embeddings, expected)
    assert not adapted.vit.embeddings.cls_token.requires_grad
    assert not adapted.training

    pixels = torch.rand(2, 3, size, size)
    with torch.no_grad():
        by_itself = model(pixels, interpolate_pos_encoding=True).logits
        torch.testing.assert_close(adapted(pixels).logits, by_itself)
    adapted.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForImageClassification.from_pretrained(tmp_path)(pixels).logits, by_itself)


def test_a_model_that_takes_the_size_is_returned() -> None:
    resnet = tf.ResNetModel(tf.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))
    dinov2 = tf.Dinov2Model(tf.Dinov2Config(**VIT, mlp_ratio=2))  # which interpolates in each pass
    dinov3 = tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**VIT))
    swin = tf.SwinModel(
        tf.SwinConfig(embed_dim=4, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4)
    )
    for model, size in ((resnet, 33), (dinov2, 48), (dinov3, 48), (swin, 30), (classifier(), 32)):
        assert adapt_image_size(model, size) is model


def test_pretext_models_and_both_levels() -> None:
    source = classifier()
    for kind in (SimCLRForPreTraining, BYOLForPreTraining):
        sizes = {"predictor_dims": (5, 4)} if kind is BYOLForPreTraining else {}
        lower: Any = adapt_image_size(kind.from_backbone(source, projection_dims=(5, 4), **sizes), 48)
        lower(pixel_values=torch.rand(4, 2, 3, 48, 48)).loss.backward()
        if kind is BYOLForPreTraining:
            assert not any(parameter.requires_grad for parameter in lower.target.parameters())
        model = BiSSLModel.from_models(lower, adapt_image_size(source, 48))
        assert model(pixel_values=torch.rand(2, 3, 48, 48)).logits.shape == (2, 3)


def test_patches_must_divide_the_size() -> None:
    for size, choices in ((30, "24 or 32"), (5, "8")):
        with pytest.raises(ValueError, match=rf"side is {size}, which the patches of the vit .* choose {choices}\."):
            adapt_image_size(classifier(), size, field="side")
    with pytest.raises(ValueError, match=r"image_size is 30, which the patches of the dinov2"):
        adapt_image_size(tf.Dinov2Model(tf.Dinov2Config(**VIT, mlp_ratio=2)), 30)


def test_models_that_cannot_be_adapted() -> None:
    class Fixed(tf.ViTModel):
        """A ViT that cannot interpolate."""

    model = Fixed(tf.ViTConfig(**VIT))
    model.embeddings.position_embeddings = None
    with pytest.raises(ValueError, match=r"image_size is 48, and the vit .* made for 32\. Set image_size to 32"):
        adapt_image_size(model, 48)
    mae = tf.ViTMAEForPreTraining(
        tf.ViTMAEConfig(**VIT, decoder_hidden_size=8, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match=r"decoder_pos_embed cannot be interpolated to 48; start from its backbone"):
        adapt_image_size(mae, 48)


def test_own_preprocessing_has_the_size_of_the_configuration_where_a_processor_names_none(tmp_path) -> None:
    settings = {"image_mean": [0.1] * 3, "image_std": [0.2] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    config = tf.ViTConfig(**{**VIT, "image_size": 24})
    for whole in (config, BiSSLConfig(config, config, "ViTModel", "ViTForImageClassification")):
        found = own_preprocessing(str(tmp_path), whole)
        assert (found.image_size, found.mean) == (24, (0.1,) * 3)
    assert own_preprocessing(str(tmp_path), config, image_size=16).image_size == 16
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    assert own_preprocessing(str(tmp_path), config) == Preprocessing(image_size=24)
