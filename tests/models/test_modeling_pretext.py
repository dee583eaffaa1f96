"""The pretext models on tiny ResNet and ViT backbones: what all of them do alike."""

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    PretrainedConfig,
    ResNetForImageClassification,
    ViTForImageClassification,
)

from bissl_hf import (
    BarlowTwinsConfig,
    BarlowTwinsForPreTraining,
    BiSSLModel,
    BYOLConfig,
    BYOLForPreTraining,
    SimCLRConfig,
    SimCLRForPreTraining,
    VICRegConfig,
    VICRegForPreTraining,
)
from bissl_hf.losses import barlow_twins_loss, byol_loss, nt_xent_loss, vicreg_loss
from bissl_hf.models.auto import PRETEXT_MODELS, pretext_class, resolve_class
from bissl_hf.models.backbone import load_backbone
from bissl_hf.models.modeling_pretext import PretextModel
from bissl_hf.tensors import Vector

from .test_modeling_simclr import convnext_config, resnet_config, same_weights, two_views, vit_config

# Tiny widths, and settings that are not the defaults.
SETTINGS: dict[str, dict[str, Any]] = {
    "simclr": {"projection_dims": [7, 5], "temperature": 0.2},
    "byol": {"projection_dims": [7, 5], "predictor_dims": [6, 5], "ema_decay": 0.9, "ema_schedule": "cosine"},
    "vicreg": {
        "projection_dims": [7, 5],
        "invariance_weight": 2.0,
        "variance_weight": 3.0,
        "covariance_weight": 4.0,
    },
    "barlow_twins": {"projection_dims": [7, 5], "redundancy_weight": 0.1},
}
BACKBONES = {
    "resnet": (resnet_config, ResNetForImageClassification),
    "vit": (vit_config, ViTForImageClassification),
}


def build(task: str, config: PretrainedConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model_class = pretext_class(task)
    return model_class(model_class.config_class(backbone_config=config, **SETTINGS[task]))


@pytest.fixture(params=SETTINGS)
def task(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=BACKBONES)
def backbone(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_task_of_the_table_is_tested_here() -> None:
    assert PRETEXT_MODELS.keys() == SETTINGS.keys()
    assert all(resolve_class(name) is pretext_class(task) for task, name in PRETEXT_MODELS.items())
    assert {pretext_class(task) for task in SETTINGS} == {
        SimCLRForPreTraining, BYOLForPreTraining, VICRegForPreTraining, BarlowTwinsForPreTraining,
    }  # fmt: skip


def test_defaults_are_those_of_the_papers() -> None:
    assert list(SimCLRConfig().projection_dims) == list(BYOLConfig().projection_dims) == [256, 256, 256]
    assert (list(BYOLConfig().predictor_dims), BYOLConfig().ema_decay) == ([256, 256, 256], 0.9995)
    assert BYOLConfig().ema_schedule == "constant"
    assert list(VICRegConfig().projection_dims) == list(BarlowTwinsConfig().projection_dims) == [8192, 8192, 8192]
    vicreg = VICRegConfig()
    assert (vicreg.invariance_weight, vicreg.variance_weight, vicreg.covariance_weight) == (25, 25, 1)
    assert BarlowTwinsConfig().redundancy_weight == 0.0051
    for loss, config in [(vicreg_loss, vicreg), (barlow_twins_loss, BarlowTwinsConfig())]:
        for name, parameter in inspect.signature(loss).parameters.items():
            if parameter.default is not parameter.empty:
                assert parameter.default == getattr(config, name)


def test_configuration_errors() -> None:
    for name in ("invariance_weight", "variance_weight", "covariance_weight"):
        with pytest.raises(ValueError, match=f"{name} is -1.0; it must be a number of at least 0"):
            VICRegConfig(**{name: -1.0})
    with pytest.raises(ValueError, match="redundancy_weight is nan"):
        BarlowTwinsConfig(redundancy_weight=float("nan"))
    with pytest.raises(ValueError, match=r"ema_decay is 1\.5; it must be between 0 and 1"):
        BYOLConfig(ema_decay=1.5)
    with pytest.raises(ValueError, match="ema_schedule is 'linear'; it must be one of constant, cosine"):
        BYOLConfig(ema_schedule="linear")
    with pytest.raises(ValueError, match="predictor_dims ends with 4 and projection_dims with 256"):
        BYOLConfig(predictor_dims=(8, 4))
    with pytest.raises(ValueError, match="predictor_dims is \\(\\)"):
        BYOLConfig(predictor_dims=())


def test_the_loss_is_that_of_the_embeddings(task: str, backbone: str) -> None:
    model, views = build(task, BACKBONES[backbone][0]()).double(), two_views().double()
    reference = copy.deepcopy(model)
    output = model(pixel_values=views)
    embeddings = torch.stack([reference.embed(view) for view in views.unbind(1)], dim=1)
    if task == "byol":  # the target is still the copy of the online network
        predictions = torch.stack([reference.predictor(part) for part in embeddings.unbind(1)], dim=1)
        expected = byol_loss(predictions, embeddings)
        embeddings = torch.cat([predictions, embeddings], dim=1)
    elif task == "simclr":
        expected = nt_xent_loss(*embeddings.unbind(1), temperature=0.2)
    elif task == "vicreg":
        expected = vicreg_loss(
            *embeddings.unbind(1), invariance_weight=2.0, variance_weight=3.0, covariance_weight=4.0
        )
    else:
        expected = barlow_twins_loss(*embeddings.unbind(1), redundancy_weight=0.1)
    torch.testing.assert_close(output.embeddings, embeddings, rtol=0, atol=1e-12)
    torch.testing.assert_close(output.loss, expected, rtol=0, atol=1e-12)
    assert torch.equal(model.loss_from_embeddings(output.embeddings), output.loss)
    without = copy.deepcopy(reference)(pixel_values=views, return_loss=False)
    assert without.loss is None
    torch.testing.assert_close(without.embeddings, embeddings, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"must be \(batch, 2, channels, height, width\)"):
        model(pixel_values=views[:, 0])


def test_saved_and_loaded(task: str, backbone: str, tmp_path: Path) -> None:
    model = build(task, BACKBONES[backbone][0]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a target that is no copy any more
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_weights(loaded, model)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert {name: getattr(config, name) for name in SETTINGS[task]} == SETTINGS[task]
    assert torch.equal(loaded(pixel_values=two_views()).loss, model(pixel_values=two_views()).loss)
    assert same_weights(load_backbone(str(tmp_path)), model.backbone)


def test_from_backbone_and_as_lower_model(task: str, backbone: str, tmp_path: Path) -> None:
    config, classifier_class = BACKBONES[backbone]
    torch.manual_seed(1)
    classifier = classifier_class(config())
    classifier.save_pretrained(tmp_path / "classifier")
    for source in (classifier, str(tmp_path / "classifier")):
        lower = pretext_class(task).from_backbone(source, **SETTINGS[task])
        assert same_weights(lower.backbone, classifier.base_model)
        assert {name: getattr(lower.config, name) for name in SETTINGS[task]} == SETTINGS[task]
    model = BiSSLModel.from_models(lower, classifier)
    model.save_pretrained(tmp_path / "both")
    loaded = BiSSLModel.from_pretrained(tmp_path / "both")
    assert same_weights(loaded, model)
    for pair in (model, loaded):
        assert pair.lower.base_model is pair.lower.backbone
        assert set(pair.shared_parameter_names) == {name for name, _ in classifier.base_model.named_parameters()}
        heads = {id(parameter) for parameter in pair.head_parameters("lower")}
        names = {name.split(".")[0] for name, p in pair.lower.named_parameters() if id(p) in heads}
        assert names == {"projection_head"} | ({"predictor"} if task == "byol" else set())
    loss = model(level="lower", pixel_values=two_views()).loss
    gradients = torch.autograd.grad(loss, model.backbone_parameters("lower"), create_graph=True, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
    loaded.aligned_model().save_pretrained(tmp_path / "aligned")
    assert same_weights(classifier_class.from_pretrained(tmp_path / "aligned").base_model, classifier.base_model)


def test_hessian_vector_product_equals_finite_differences_of_the_gradient(task: str) -> None:
    """Through a smooth backbone that computes all of it in float64 (attention takes its softmax in float32)."""
    model = build(task, convnext_config()).double().eval()
    views = two_views().double()
    parameters = tuple(p for p in model.backbone.parameters() if p.requires_grad)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in parameters:  # the small values of new layers make layer norms nearly singular
            parameter.copy_(0.5 * torch.randn_like(parameter))
    direction = tuple(torch.randn_like(p) for p in parameters)

    def gradient(*, create_graph: bool = False) -> Vector:
        loss = model(pixel_values=views).loss
        return torch.autograd.grad(loss, parameters, create_graph=create_graph, materialize_grads=True)

    def moved(distance: float) -> Vector:
        with torch.no_grad():
            torch._foreach_add_(list(parameters), list(direction), alpha=distance)
        try:
            return gradient()
        finally:
            with torch.no_grad():
                torch._foreach_add_(list(parameters), list(direction), alpha=-distance)

    step = 1e-6
    products = torch.autograd.grad(
        gradient(create_graph=True), parameters, direction, allow_unused=True, materialize_grads=True
    )
    expected = [(plus - minus) / (2 * step) for plus, minus in zip(moved(step), moved(-step), strict=True)]
    scale = max(float(wanted.abs().max()) for wanted in expected)
    for product, wanted in zip(products, expected, strict=True):
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-6 * scale)


def test_only_convex_losses_offer_outputs() -> None:
    for task in ("vicreg", "barlow_twins"):
        assert not hasattr(pretext_class(task), "outputs_from_embeddings")
        assert not hasattr(pretext_class(task), "loss_from_outputs")


def test_from_backbone_refuses_unknown_settings_and_models_without_images() -> None:
    with pytest.raises(TypeError, match="VICRegConfig does not take temperature; it takes covariance_weight"):
        VICRegForPreTraining.from_backbone("nowhere", temperature=0.5)
    text = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    with pytest.raises(ValueError, match="BertModel, which takes input_ids; BYOLForPreTraining needs a vision model"):
        BYOLForPreTraining.from_backbone(text)


def test_a_model_without_a_loss_says_so() -> None:
    model = PretextModel(SimCLRConfig(backbone_config=resnet_config()))
    with pytest.raises(NotImplementedError, match="PretextModel must define loss_from_embeddings"):
        model.loss_from_embeddings(torch.zeros(2, 2, 3))
