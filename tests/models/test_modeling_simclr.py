"""SimCLR on tiny ResNet, ConvNeXt V2 and ViT backbones."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    MobileNetV2Config,
    PretrainedConfig,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from bissl_hf import SimCLRConfig, SimCLRForPreTraining
from bissl_hf.losses import nt_xent_loss

SIZE = 16


def resnet_config() -> ResNetConfig:
    return ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic")


def convnext_config() -> ConvNextV2Config:
    return ConvNextV2Config(hidden_sizes=[4, 6], depths=[1, 1], num_stages=2, patch_size=2)


def vit_config() -> ViTConfig:
    return ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=SIZE, patch_size=8
    )


CLASSIFIERS = {
    "resnet": (resnet_config, ResNetForImageClassification, 6),
    "convnextv2": (convnext_config, ConvNextV2ForImageClassification, 6),
    "vit": (vit_config, ViTForImageClassification, 8),
}


@pytest.fixture(params=CLASSIFIERS)
def family(request: pytest.FixtureRequest) -> tuple[Any, type[PreTrainedModel], int]:
    return CLASSIFIERS[request.param]


def build(config: PretrainedConfig) -> SimCLRForPreTraining:
    torch.manual_seed(0)
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(7, 7, 5)))


def two_views(rows: int = 4) -> torch.Tensor:
    return torch.rand(rows, 2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    left, right = first.state_dict(), second.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Configuration


def test_default_backbone_is_a_resnet18() -> None:
    config = SimCLRConfig()
    assert (config.feature_size, list(config.projection_dims), config.temperature) == (512, [256, 256, 256], 0.5)
    with torch.device("meta"):
        backbone = SimCLRForPreTraining(config).backbone
    assert sum(p.numel() for p in backbone.parameters()) == 11_176_512


def test_configuration_round_trip(family: Any, tmp_path: Path) -> None:
    config = SimCLRConfig(backbone_config=family[0](), projection_dims=(3, 2), temperature=0.1)
    assert config.feature_size == family[2]
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, SimCLRConfig)
    assert type(loaded.backbone_config) is type(config.backbone_config)
    assert list(loaded.projection_dims) == [3, 2]
    assert (loaded.temperature, loaded.feature_size) == (0.1, family[2])


def test_backbone_configuration_as_a_dictionary() -> None:
    config = SimCLRConfig(backbone_config={"model_type": "resnet", "hidden_sizes": [4, 6], "depths": [1, 1]})
    assert isinstance(config.backbone_config, ResNetConfig)
    assert config.feature_size == 6


def test_configuration_errors() -> None:
    with pytest.raises(ValueError, match="no `model_type`"):
        SimCLRConfig(backbone_config={"hidden_sizes": [4]})
    with pytest.raises(ValueError, match="The model_type of a sub-model is 'mynet', which transformers does not know"):
        SimCLRConfig(backbone_config={"model_type": "mynet"})
    with pytest.raises(ValueError, match="temperature is 0"):
        SimCLRConfig(temperature=0)
    for dims in [(), (4, 0)]:
        with pytest.raises(ValueError, match="projection_dims is"):
            SimCLRConfig(projection_dims=dims)
    with pytest.raises(
        ValueError, match=r"A 'bert' backbone does not turn an image of 224 x 224 pixels into features"
    ):
        SimCLRConfig(backbone_config=BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    assert SimCLRConfig(backbone_config=MobileNetV2Config()).feature_size == 1280  # which it does not say
    assert SimCLRConfig(backbone_config=MobileNetV2Config(), feature_size=7).feature_size == 7
    with pytest.raises(TypeError, match="is a str; it must be a PretrainedConfig or a dict"):
        SimCLRConfig(backbone_config="resnet")


# Architecture


def test_backbone_names_are_those_of_the_classifier(family: Any) -> None:
    model, classifier = build(family[0]()), family[1](family[0]())
    expected = {name: p.shape for name, p in classifier.base_model.named_parameters()}
    assert {name: p.shape for name, p in model.base_model.named_parameters()} == expected
    assert model.base_model is model.backbone


def test_projection_head() -> None:
    layers = list(build(resnet_config()).projection_head)
    assert [type(layer).__name__ for layer in layers] == [
        *("Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear")
    ]
    assert [(layer.in_features, layer.out_features, layer.bias is not None) for layer in layers[::3]] == [
        *((6, 7, True), (7, 7, True), (7, 5, False))
    ]


# Forward


def features(model: SimCLRForPreTraining, images: torch.Tensor) -> torch.Tensor:
    outputs = model.backbone(pixel_values=images)
    if isinstance(model.config.backbone_config, ViTConfig):
        return outputs.last_hidden_state[:, 0]
    return outputs.pooler_output.reshape(len(images), -1)


def test_views_pass_one_after_the_other(family: Any) -> None:
    model, views = build(family[0]()), two_views()
    reference = copy.deepcopy(model)
    outputs = model(pixel_values=views)
    # The head's own batch norm makes a joint pass of both views another function.
    embeddings = [reference.projection_head(features(reference, views[:, v])) for v in (0, 1)]
    torch.testing.assert_close(outputs.embeddings, torch.stack(embeddings, dim=1), rtol=0, atol=1e-6)
    torch.testing.assert_close(outputs.loss, nt_xent_loss(*embeddings, temperature=0.5))
    assert same_weights(model, reference)  # and the running statistics moved twice, first view first
    joint = reference.projection_head(features(reference, views.transpose(0, 1).flatten(0, 1)))
    assert (joint - torch.cat(embeddings)).abs().max() > 1e-3
    outputs.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_spatial_mean_where_a_backbone_does_not_pool() -> None:
    config = MobileNetV2Config(depth_multiplier=0.25, min_depth=4, depth_divisible_by=4, image_size=32)
    with torch.no_grad():
        images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        model = SimCLRForPreTraining(
            SimCLRConfig(backbone_config=config, projection_dims=(3,), feature_size=1280)
        ).eval()
        model.backbone.pooler = None
        hidden = model.backbone(pixel_values=images).last_hidden_state
        assert hidden.ndim == 4
        torch.testing.assert_close(model.embed(images), hidden.mean(dim=(2, 3)) @ model.projection_head[0].weight.T)


@pytest.mark.parametrize("shape", [(4, 3, SIZE, SIZE), (4, 1, 3, SIZE, SIZE), (2, 2, 2, 3, SIZE, SIZE)])
def test_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(batch, 2, channels, height, width\)"):
        build(resnet_config())(pixel_values=torch.zeros(shape))


# Loading and saving


def test_round_trip(family: Any, tmp_path: Path) -> None:
    model = build(family[0]())
    model(pixel_values=two_views())  # statistics that are not the initial ones
    model.save_pretrained(tmp_path)
    loaded, report = SimCLRForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(loaded, model)


@pytest.mark.parametrize("kept", ["backbone.", "backbone. and biases"])
def test_a_missing_head_is_initialised(kept: str, tmp_path: Path) -> None:
    model = build(resnet_config())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights = {
        name: tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.") or (kept.endswith("biases") and name.endswith("0.bias"))
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(1)
    loaded = SimCLRForPreTraining.from_pretrained(tmp_path)
    assert same_weights(loaded.backbone, model.backbone)
    for layer in loaded.projection_head:
        if isinstance(layer, torch.nn.Linear):
            bound = layer.in_features**-0.5  # of torch's default
            assert 0.3 * bound < layer.weight.abs().max() <= bound
        elif isinstance(layer, torch.nn.BatchNorm1d):
            for tensor, value in [(layer.weight, 1), (layer.bias, 0), (layer.running_mean, 0), (layer.running_var, 1)]:
                assert torch.equal(tensor, torch.full_like(tensor, value))
            assert layer.num_batches_tracked == 0
    if kept.endswith("biases"):
        assert torch.equal(loaded.projection_head[0].bias, model.projection_head[0].bias)


def test_from_backbone_copies_an_instance(family: Any) -> None:
    torch.manual_seed(1)
    classifier = family[1](family[0]())
    before = copy.deepcopy(classifier)
    model = SimCLRForPreTraining.from_backbone(classifier, projection_dims=(7, 5), temperature=0.2)
    assert same_weights(model.backbone, classifier.base_model)
    assert (list(model.config.projection_dims), model.config.temperature) == ([7, 5], 0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same_weights(classifier, before)
    assert model.config.backbone_config is not classifier.config
    assert classifier.config.to_dict() == before.config.to_dict()


def test_from_backbone_leaves_the_attention_of_its_argument_alone() -> None:
    source = ViTForImageClassification._from_config(vit_config(), attn_implementation="eager")
    model = SimCLRForPreTraining.from_backbone(source)
    assert source.config._attn_implementation == "eager"
    assert model.backbone.config._attn_implementation == "eager"


def test_from_backbone_drops_the_pooler_of_a_base_model() -> None:
    source = ViTModel(vit_config())
    assert any(name.startswith("pooler") for name in source.state_dict())
    model = SimCLRForPreTraining.from_backbone(source)
    weights = source.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.backbone.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_keeps_its_dtype_and_a_checkpoint_becomes_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    source = ResNetModel(resnet_config()).to(dtype)
    source.save_pretrained(tmp_path)
    for given, expected in ((source, dtype), (str(tmp_path), torch.float32)):
        model = SimCLRForPreTraining.from_backbone(given, projection_dims=(7, 5))
        assert {p.dtype for p in model.parameters()} == {expected}


@pytest.mark.parametrize("saved", ["base", "classifier", "simclr"])
def test_from_backbone_reads_a_folder(family: Any, saved: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = family[1](family[0]())
    simclr = SimCLRForPreTraining.from_backbone(classifier, projection_dims=(3,))
    {"base": classifier.base_model, "classifier": classifier, "simclr": simclr}[saved].save_pretrained(tmp_path)
    model = SimCLRForPreTraining.from_backbone(str(tmp_path))
    assert same_weights(model.backbone, classifier.base_model)


def test_from_backbone_refuses_a_backbone_in_parts(tmp_path: Path) -> None:
    model = ResNetModel(resnet_config())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("embedder.embedder.convolution.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the backbone's parameters: .*embedder.convolution.weight"):
        SimCLRForPreTraining.from_backbone(str(tmp_path))
    model.embedder.embedder.convolution = torch.nn.Identity()
    with pytest.raises(
        ValueError, match=r"lacks 1 of the parameters of SimCLRForPreTraining: embedder\.embedder.convolution"
    ):
        SimCLRForPreTraining.from_backbone(model)
