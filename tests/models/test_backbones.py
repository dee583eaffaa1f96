"""Every family of backbones goes the whole way: saved, loaded, under a pretext task, joined, exported, opened."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from bissl_hf import BiSSLModel, SimCLRForPreTraining, TrainTransform
from bissl_hf.data.preprocessing import Preprocessing
from bissl_hf.evaluation.features import extract_features
from bissl_hf.models.backbone import (
    backbone_model,
    backbone_of,
    backbone_parameters,
    backbone_prefix,
    build_backbone,
    embed_images,
    infer_feature_size,
    load_backbone,
    pool_features,
)
from bissl_hf.models.classifier import classifier_on, labels_of_task, new_classifier
from bissl_hf.models.pretext import build_pretext_model, pretext_tasks
from bissl_hf.tasks.downstream import DownstreamTask

SIZE = 32
NAMES = ["ant", "bee", "cow"]
VIT: dict[str, Any] = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "image_size": SIZE,
    "patch_size": 8,
}  # fmt: skip
DINO = {**VIT, "mlp_ratio": 2}
FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "resnet": lambda: tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"),
    "bottleneck": lambda: tf.ResNetConfig(embedding_size=4, hidden_sizes=[8, 12], depths=[1, 1]),
    "grey resnet": lambda: tf.ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1]),
    "convnextv2": lambda: tf.ConvNextV2Config(hidden_sizes=[4, 4, 6, 6], depths=[1, 1, 1, 1], image_size=SIZE),
    "vit": lambda: tf.ViTConfig(**VIT),
    "vit of 6 channels": lambda: tf.ViTConfig(**VIT, num_channels=6),
    "dinov2": lambda: tf.Dinov2Config(**DINO),
    "dinov2 with registers": lambda: tf.Dinov2WithRegistersConfig(**DINO, num_register_tokens=2),
    "dinov3 vit": lambda: tf.DINOv3ViTConfig(**VIT, num_register_tokens=2),
    "dinov3 convnext": lambda: tf.DINOv3ConvNextConfig(hidden_sizes=[4, 4, 6, 6], depths=[1, 1, 1, 1]),
    "swin": lambda: tf.SwinConfig(
        embed_dim=4, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=SIZE, patch_size=4
    ),
    "swinv2": lambda: tf.Swinv2Config(
        embed_dim=4, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=SIZE, patch_size=4
    ),
    "efficientnet": lambda: tf.EfficientNetConfig(
        image_size=SIZE, hidden_dim=320, width_coefficient=0.25, depth_coefficient=0.2
    ),
    "mobilenet_v2": lambda: tf.MobileNetV2Config(depth_multiplier=0.35, image_size=SIZE, finegrained_output=False),
    "mobilevit": lambda: tf.MobileViTConfig(
        image_size=SIZE, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 32]
    ),
}
SMALL: dict[str, dict[str, Any]] = {
    **{task: {"projection_dims": (5, 4)} for task in ("simclr", "vicreg", "barlow_twins")},
    "byol": {"projection_dims": (5, 4), "predictor_dims": (5, 4)},
    "mae": {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1},
}
DINOV3 = ("dinov3 vit", "dinov3 convnext")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    torch.manual_seed(0)
    return request.param


def classifier_of(family: str) -> PreTrainedModel:
    """A classifier in which nothing has a special value."""
    model = new_classifier(FAMILIES[family](), NAMES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point() and name in model.state_dict():
                buffer += 0.1 * torch.rand_like(buffer)
    return model


def images(model: PreTrainedModel, rows: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(rows, getattr(model.config, "num_channels", 3), SIZE, SIZE, generator=generator)


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    weights = second.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())


def test_the_whole_way(family: str, tmp_path: Path) -> None:
    """The checkpoint is in half precision, as many on the Hub."""
    classifier = classifier_of(family)
    with torch.no_grad():
        for tensor in classifier.state_dict().values():
            tensor.copy_(tensor.bfloat16())
    half = copy.deepcopy(classifier).bfloat16()
    half.save_pretrained(tmp_path / "source")
    backbone = load_backbone(str(tmp_path / "source"))
    assert same_weights(backbone, backbone_model(classifier))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}

    lower = SimCLRForPreTraining.from_backbone(str(tmp_path / "source"), projection_dims=(7, 5))
    lower.save_pretrained(tmp_path / "lower")
    assert same_weights(SimCLRForPreTraining.from_pretrained(tmp_path / "lower"), lower)
    assert same_weights(load_backbone(str(tmp_path / "lower")), backbone)
    pixels = images(classifier, rows=4)
    lower.eval()(pixel_values=torch.stack([pixels, pixels.flip(-1)], dim=1)).loss.backward()

    upper = AutoModelForImageClassification.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    model = BiSSLModel.from_models(lower, upper)
    assert set(model.shared_parameter_names) == {name for name, _ in backbone.named_parameters()}
    model.save_pretrained(tmp_path / "both")
    assert same_weights(BiSSLModel.from_pretrained(tmp_path / "both"), model)
    with torch.no_grad():
        expected = classifier(pixels).logits
    torch.testing.assert_close(model.eval()(pixel_values=pixels).logits, expected)

    exported = model.export(tmp_path / "aligned", recalibrate_on=[{"pixel_values": pixels}])
    native = AutoModelForImageClassification.from_pretrained(tmp_path / "aligned")
    assert type(native) is type(classifier)
    assert same_weights(native, exported)


def test_a_backbone_under_every_pretext_task(family: str) -> None:
    source = backbone_model(classifier_of(family))
    pixels = images(source, rows=4)
    for task in pretext_tasks():
        if task == "mae" and family not in ("vit", "vit of 6 channels"):
            with pytest.raises(ValueError, match="masked image modelling needs a ViT"):
                build_pretext_model(task, source)
            continue
        model = build_pretext_model(task, source, **SMALL[task])
        views = pixels if task == "mae" else torch.stack([pixels, pixels.flip(-1)], dim=1)
        assert model(pixel_values=views).loss.isfinite()
        pair = BiSSLModel.from_models(model, classifier_on(model, NAMES))
        theta = pair.backbone_parameters("upper")
        assert len(theta) >= len(list(source.parameters())) - 2  # ViT-MAE has fixed positions


def test_features_are_those_of_the_classifier(family: str) -> None:
    """The classifier's head, on the features, gives its logits; DINOv2's takes the mean over patches beside them."""
    model = classifier_of(family)
    pixels = images(model)
    seen = []
    heads = [
        module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "classifier" in name
    ]
    heads[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    with torch.no_grad():
        model(pixels)
        features = embed_images(model, pixels)
    width = features.shape[1]
    assert infer_feature_size(model.config) == width
    torch.testing.assert_close(features, seen[0][:, :width])
    batches = [{"pixel_values": pixels, "labels": torch.tensor([0, 1])}]
    torch.testing.assert_close(torch.tensor(extract_features(model, batches)[0]), features)


def test_a_trial_pass_draws_no_random_numbers(family: str) -> None:
    before = torch.get_rng_state()
    infer_feature_size(FAMILIES[family]())
    assert torch.equal(torch.get_rng_state(), before)


def test_base_models_are_loaded_too(family: str, tmp_path: Path) -> None:
    """A backbone on the Hub is often a base model, which may have a pooler that classifiers do not use."""
    source = AutoModel.from_config(FAMILIES[family]())
    source.save_pretrained(tmp_path)
    for found in (load_backbone(str(tmp_path)), load_backbone(source)):
        weights = source.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in found.state_dict().items())
        assert same_weights(SimCLRForPreTraining.from_backbone(found, projection_dims=(3,)).backbone, source) or any(
            "pooler" in name for name in weights
        )
        assert classifier_on(found, NAMES)(images(source)).logits.shape == (2, 3)


@pytest.mark.parametrize("family", DINOV3)
def test_the_backbone_of_a_dinov3_is_the_whole_model(family: str) -> None:
    whole = AutoModel.from_config(FAMILIES[family]())
    assert whole.base_model is not whole
    assert backbone_of(whole) is backbone_model(whole) is whole
    assert backbone_prefix(whole) == ""
    assert set(backbone_parameters(whole)) == {name for name, _ in whole.named_parameters()}
    model = new_classifier(FAMILIES[family](), NAMES)
    assert backbone_prefix(model) == "model."
    assert set(backbone_parameters(model)) == set(backbone_parameters(whole))
    labels = torch.tensor([0, 2])
    outputs = model(images(model), labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))


OPEN = """
import sys, json
sys.modules["bissl_hf"] = None
import torch
from transformers import AutoModel, AutoModelForImageClassification
for folder in sys.argv[1:]:
    kind = AutoModel if "dinov3" in folder else AutoModelForImageClassification
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"], report
    pixels = torch.load(folder + "/pixels.pt", weights_only=True)
    outputs = model(pixels)
    torch.save(outputs.pooler_output if kind is AutoModel else outputs.logits, folder + "/found.pt")
"""


@pytest.mark.slow
def test_exports_open_without_this_package(tmp_path: Path) -> None:
    """All families in one process; of DINOv3 the backbone, on which transformers has no classifier."""
    expected = {}
    for family in FAMILIES:
        torch.manual_seed(0)
        folder = str(tmp_path / family)
        source = classifier_of(family)
        model = BiSSLModel.from_models(SimCLRForPreTraining.from_backbone(source, projection_dims=(3,)), source)
        pixels = images(source)
        exported = model.export(folder, recalibrate_on=[{"pixel_values": pixels}])
        torch.save(pixels, f"{folder}/pixels.pt")
        with torch.no_grad():
            expected[folder] = embed_images(exported, pixels) if family in DINOV3 else exported(pixels).logits
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", OPEN, *expected], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    for folder, values in expected.items():
        torch.testing.assert_close(torch.load(f"{folder}/found.pt", weights_only=True), values, rtol=1e-4, atol=1e-4)


# Pooling


class Outputs:
    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state


def test_a_sequence_without_class_token_is_averaged() -> None:
    tokens = torch.rand(2, 5, 3)
    for class_token, expected in ((True, tokens[:, 0]), (False, tokens.sum(1) / 5)):
        torch.testing.assert_close(pool_features(Outputs(tokens), class_token=class_token), expected)
    maps = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(pool_features(Outputs(maps), class_token=False), maps.sum((2, 3)) / 20)
    swin = tf.SwinModel(FAMILIES["swin"](), add_pooling_layer=False).eval()
    pixels = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(embed_images(swin, pixels), swin(pixels).last_hidden_state.mean(1))


# What is refused


def test_weights_that_are_not_finite_are_refused(family: str, tmp_path: Path) -> None:
    model = classifier_of(family)
    name, parameter = next(iter(backbone_parameters(model).items()))
    with torch.no_grad():
        parameter.view(-1)[0] = float("nan")
    model.save_pretrained(tmp_path)
    for source in (str(tmp_path), model):
        with pytest.raises(ValueError, match=rf"{name} hold NaN or infinity.*has diverged; choose another"):
            load_backbone(source)


def test_a_backbone_without_a_classifier() -> None:
    config = tf.ViTMAEConfig(**VIT)
    assert type(classifier_on(build_backbone(config), NAMES)) is tf.ViTForImageClassification
    with pytest.raises(ValueError, match=r"of type 'bert', on which transformers has no image classifier"):
        new_classifier(tf.BertConfig(), NAMES)


def test_a_folder_that_lacks_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    AutoModel.from_config(FAMILIES["dinov3 vit"]()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("norm.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the backbone's parameters: norm\.weight"):
        load_backbone(str(tmp_path))


def test_a_timm_folder_without_timm(tmp_path: Path) -> None:
    if tf.utils.is_timm_available():  # then it loads, see test_timm.py
        return
    config = {"architecture": "resnet18", "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"is a model of timm, which is not installed; install the extra: .*\[timm\]"):
        load_backbone(str(tmp_path))


# Both levels on a backbone


def test_both_levels_from_a_backbone(family: str, tmp_path: Path) -> None:
    source = classifier_of(family)
    source.save_pretrained(tmp_path)
    labels = {0: "ant", 1: "bee"}
    model = BiSSLModel.from_backbone(str(tmp_path), id2label=labels, projection_dims=(4, 3), temperature=0.3)
    assert (model.lower.config.temperature, model.lower.config.projection_dims) == (0.3, [4, 3])
    assert model.upper.config.id2label == labels
    for level in (model.lower, model.upper):
        own = backbone_parameters(level)
        assert all(torch.equal(value, own[name]) for name, value in backbone_parameters(source).items())
    byol = BiSSLModel.from_backbone(source, num_labels=4, pretext="byol", **SMALL["byol"])
    assert type(byol.lower).__name__ == "BYOLForPreTraining"
    assert byol.upper.config.num_labels == 4


def test_both_levels_with_a_task_and_a_vit_mae() -> None:
    backbone = AutoModel.from_config(FAMILIES["vit"]())
    size = backbone.config.image_size
    task = DownstreamTask(
        "multi_label_classification", ["a", "b"], Preprocessing(image_size=size), TrainTransform(size)
    )
    model = BiSSLModel.from_backbone(
        backbone, task=task, pretext="mae", decoder_hidden_size=8, decoder_num_attention_heads=2,
        decoder_num_hidden_layers=1,
    )  # fmt: skip
    assert isinstance(model.lower, tf.ViTMAEForPreTraining)
    assert model.upper.config.problem_type == "multi_label_classification"
    assert model.upper.config.id2label == {0: "a", 1: "b"}


WRONG_LABELS = [
    ({}, "Of id2label, num_labels and task none is given; give one"),
    ({"num_labels": 2, "id2label": {0: "a"}}, "Of id2label, num_labels and task id2label and num_labels is given"),
    ({"num_labels": 0}, "num_labels is 0; it must be an integer of at least 1"),
    ({"id2label": {1: "a", 2: "b"}}, r"id2label has the numbers \[1, 2\]; they must be 0, 1, ..."),
    ({"id2label": {}}, r"id2label has the numbers \[\]"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_LABELS)
def test_labels_that_do_not_say_what_the_classes_are(given: dict[str, Any], message: str) -> None:
    everything = {"id2label": None, "num_labels": None, "task": None, **given}
    with pytest.raises(ValueError, match=message):
        labels_of_task(**everything)
