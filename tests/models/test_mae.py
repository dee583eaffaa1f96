"""Masked image modelling on the weights of a ViT."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ResNetModel, ViTConfig, ViTForImageClassification, ViTMAEForPreTraining, ViTModel

from bissl_hf import SimCLRForPreTraining
from bissl_hf.data.alternation import keyed_random_state
from bissl_hf.evaluation.features import extract_features
from bissl_hf.models.convex_outputs import convex_outputs
from bissl_hf.models.mae import (
    freeze_positions,
    mae_from_backbone,
    masked_error,
    without_masking,
)
from bissl_hf.models.pretext import build_pretext_model, pretext_tasks

from .test_modeling_simclr import SIZE, resnet_config, same_weights

DECODER = {
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 12,
}


def vit_config(**changes: object) -> ViTConfig:
    return ViTConfig(
        **{
            "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
            "image_size": SIZE, "patch_size": 4, "layer_norm_eps": 1e-6, **changes,
        }
    )  # fmt: skip


def build(seed: int = 0, **settings: object) -> ViTMAEForPreTraining:
    torch.manual_seed(seed)
    return mae_from_backbone(ViTForImageClassification(vit_config()), **{**DECODER, **settings})


def images(rows: int = 3) -> torch.Tensor:
    return torch.rand(rows, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["base", "classifier", "folder", "mae"])
def test_the_encoder_is_the_vit(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    vit = ViTModel(vit_config())  # with a pooler, which the encoder does not have
    classifier = ViTForImageClassification(vit_config())
    classifier.vit.load_state_dict(vit.state_dict(), strict=False)
    classifier.save_pretrained(tmp_path / "vit")
    source = {"base": vit, "classifier": classifier, "folder": str(tmp_path / "vit")}
    if kind == "mae":
        mae_from_backbone(classifier, **DECODER).save_pretrained(tmp_path / "mae")
        source["mae"] = str(tmp_path / "mae")
    model = mae_from_backbone(source[kind], **DECODER).eval()
    assert same_weights(model.vit, classifier.vit)
    with torch.no_grad():
        expected = classifier.eval().vit(images()).last_hidden_state
        with without_masking(model):
            found = model.vit(images(), noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert model.config.mask_ratio == 0.75
    with torch.no_grad():
        assert model.vit(images()).last_hidden_state.shape == (3, 1 + 4, 8)


def test_features_are_those_of_all_patches() -> None:
    model = build().eval()
    batch = {"pixel_values": images(), "labels": torch.arange(3)}
    features, _ = extract_features(model, [batch])
    with torch.no_grad(), without_masking(model):
        expected = model.vit(images(), noise=torch.arange(16.0).expand(3, -1)).last_hidden_state[:, 0]
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=1e-5, atol=1e-5)


def test_positions_are_fixed_and_those_of_a_new_decoder_differ(tmp_path: Path) -> None:
    model = build()
    fixed = {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == fixed
    positions = model.decoder.decoder_pos_embed[0]
    distances = torch.cdist(positions, positions) + 9 * torch.eye(len(positions))
    assert distances.min() > 1e-3
    model.save_pretrained(tmp_path)
    loaded = freeze_positions(ViTMAEForPreTraining.from_pretrained(tmp_path))
    assert same_weights(loaded, model)
    assert {name for name, p in loaded.named_parameters() if not p.requires_grad} == fixed


def test_positions_of_the_paper_instead_of_the_backbones() -> None:
    vit = ViTForImageClassification(vit_config())
    model = mae_from_backbone(vit, positions="sincos", **DECODER)
    found = model.vit.embeddings.position_embeddings[0, 1:]
    for place in range(16):
        row, column = divmod(place, 4)
        waves = [trig(value * rate) for value in (column, row) for trig in (math.sin, math.cos) for rate in (1, 0.01)]
        torch.testing.assert_close(found[place], torch.tensor(waves), rtol=0, atol=1e-6)
    weights = vit.vit.state_dict() | {"embeddings.position_embeddings": model.vit.embeddings.position_embeddings}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.vit.state_dict().items())
    with pytest.raises(ValueError, match="positions is 'learned'; it must be one of backbone, sincos"):
        mae_from_backbone("nowhere", positions="learned")


def test_the_mask_is_drawn_from_the_key_or_the_noise() -> None:
    model = build().eval()

    def mask(key: tuple[int, ...], noise: torch.Tensor | None = None) -> torch.Tensor:
        with keyed_random_state(key), torch.no_grad():
            return model(images(), noise=noise).mask

    assert torch.equal(mask((0, 1)), mask((0, 1)))
    assert not torch.equal(mask((0, 1)), mask((0, 2)))
    assert torch.equal(mask((0, 1)).sum(dim=1), torch.full((3,), 12.0))
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(4))
    expected = torch.ones(3, 16).scatter(1, noise.argsort(dim=1)[:, :4], 0.0)  # the smallest are kept
    for key in [(0, 1), (0, 2)]:
        assert torch.equal(mask(key, noise), expected)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_and_gradient_equal_the_papers_in_loops(norm_pix_loss: bool) -> None:
    """Mean squared error over the pixels of masked patches, each normalised if so asked (section 3)."""
    model = build(norm_pix_loss=norm_pix_loss).double().eval()
    pixels, noise = images().double(), torch.rand(3, 16, generator=torch.Generator().manual_seed(4)).double()
    outputs = model(pixels, noise=noise)
    logits, total, masked = outputs.logits.detach().numpy(), 0.0, 0
    slope = np.zeros_like(logits)
    for image in range(3):
        for place in range(16):
            if sorted(noise[image].tolist()).index(float(noise[image, place])) < 4:
                continue
            row, column = divmod(place, 4)
            block = pixels[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].numpy()
            patch = np.array([block[c, y, x] for y in range(4) for x in range(4) for c in range(3)])
            if norm_pix_loss:
                patch = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + 1e-6)
            slope[image, place] = 2 * (logits[image, place] - patch) / len(patch)
            total += float(((logits[image, place] - patch) ** 2).mean())
            masked += 1
    assert outputs.loss.item() == pytest.approx(total / masked, rel=1e-6)  # the mask is in single precision
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits)
    torch.testing.assert_close(gradient, torch.from_numpy(slope / masked), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_follows_from_convex_outputs(norm_pix_loss: bool) -> None:
    model = build(norm_pix_loss=norm_pix_loss).double().eval()
    inputs = {
        "pixel_values": images().double(),
        "noise": torch.rand(3, 16, generator=torch.Generator().manual_seed(4)).double(),
    }
    outputs = model(**inputs)
    (gradient,) = torch.autograd.grad(outputs.loss, outputs.logits, retain_graph=True)
    loss = masked_error(model, inputs["pixel_values"], outputs.logits, outputs.mask)
    assert loss.item() == pytest.approx(outputs.loss.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, outputs.logits)[0], gradient, rtol=0, atol=1e-14)
    form = convex_outputs(model)
    assert form is not None
    again = form.loss(form.rows(model, inputs), inputs)
    assert again.item() == pytest.approx(outputs.loss.item(), rel=1e-12)


def test_without_masking_leaves_other_models_alone_and_restores_the_ratio() -> None:
    other = SimCLRForPreTraining.from_backbone(ViTForImageClassification(vit_config()))
    before = copy.deepcopy(other.config.to_dict())
    with without_masking(other):
        assert other.config.to_dict() == before
    model = build()
    with pytest.raises(RuntimeError, match="stop"), without_masking(model):
        raise RuntimeError("stop")
    assert model.config.mask_ratio == 0.75


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="ResNetModel; masked image modelling needs a ViT"):
        mae_from_backbone(ResNetModel(resnet_config()))
    for ratio in (0.0, 1.0, 0.99, float("nan")):
        with pytest.raises(ValueError, match=f"mask_ratio is {ratio}; of the 16 patches"):
            build(mask_ratio=ratio)
    with pytest.raises(ValueError, match="image_size is 18; it must be a multiple of the patch size 4"):
        mae_from_backbone(ViTModel(vit_config(image_size=18)))
    with pytest.raises(ValueError, match=r"image_size is .*16, 8.* and patch_size 4; ViT-MAE needs squares"):
        mae_from_backbone(ViTModel(vit_config(image_size=(16, 8))))


def test_pretext_models_by_name() -> None:
    assert pretext_tasks() == ("simclr", "byol", "vicreg", "barlow_twins", "mae")
    vit = ViTForImageClassification(vit_config())
    names = [
        type(build_pretext_model(task, vit, **(DECODER if task == "mae" else {"projection_dims": (6, 256)}))).__name__
        for task in pretext_tasks()
    ]
    assert names == [
        "SimCLRForPreTraining", "BYOLForPreTraining", "VICRegForPreTraining", "BarlowTwinsForPreTraining",
        "ViTMAEForPreTraining",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"pretext is 'moco'; it must be one of simclr, byol, .*, mae"):
        build_pretext_model("moco", vit)
