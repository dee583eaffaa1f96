"""Models of timm through the wrappers of transformers.

The tests marked `timm` run against timm itself (`make test-timm`), and, started by the first test, against a stand-in
of its interface.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, TimmWrapperConfig

from bissl_hf import BiSSLModel, SimCLRForPreTraining
from bissl_hf.cli.models import StartArguments, classifier_builder
from bissl_hf.evaluation.features import extract_features
from bissl_hf.models.backbone import (
    backbone_of,
    backbone_parameters,
    backbone_prefix,
    infer_feature_size,
    load_backbone,
)
from bissl_hf.models.classifier import classifier_on, new_classifier
from bissl_hf.models.pretext import build_pretext_model

NAMES = ["ant", "bee", "cow"]
timm = pytest.mark.timm


@pytest.mark.slow
def test_against_a_stand_in() -> None:
    """In a process of its own, since transformers decides at import whether timm is there."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "tests.models.timm_stand_in", "-m", "timm"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout
    assert "skipped" not in result.stdout


def config_of(architecture: str, **settings: Any) -> TimmWrapperConfig:
    size = 160 if architecture == "test_vit" else 32
    cfg = {"input_size": [3, size, size], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    return TimmWrapperConfig(architecture=architecture, pretrained_cfg=cfg, **settings)


@pytest.fixture(params=["test_resnet", "test_vit"])
def classifier(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    model = new_classifier(config_of(request.param), NAMES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(model: PreTrainedModel, rows: int = 2) -> torch.Tensor:
    size = model.config.pretrained_cfg["input_size"][-1]
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))


def same_weights(first: nn.Module, second: nn.Module) -> bool:
    weights = second.state_dict()
    return all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())


@timm
def test_the_classifier_in_a_base_model_is_a_head(classifier: PreTrainedModel) -> None:
    head = {id(p) for p in classifier.timm_model.get_classifier().parameters()}
    names = {name for name, p in classifier.timm_model.named_parameters() if id(p) not in head}
    assert len(head) == 2
    assert set(backbone_parameters(classifier)) == names
    assert backbone_of(classifier) is classifier.timm_model
    assert backbone_prefix(classifier) == "timm_model."
    backbone = load_backbone(classifier)
    assert set(backbone_parameters(backbone)) == names
    own = backbone_parameters(backbone)
    assert all(torch.equal(p, own[name]) for name, p in backbone_parameters(classifier).items())


@timm
def test_the_whole_way(classifier: PreTrainedModel, tmp_path: Path) -> None:
    classifier.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    classifier.float()
    lower = SimCLRForPreTraining.from_backbone(str(tmp_path / "source"), projection_dims=(7, 5))
    assert {p.dtype for p in lower.parameters()} == {torch.float32}
    lower.save_pretrained(tmp_path / "lower")
    loaded = SimCLRForPreTraining.from_pretrained(tmp_path / "lower")
    assert same_weights(loaded, lower)

    model = BiSSLModel.from_models(lower, classifier)
    assert set(model.shared_parameter_names) == set(backbone_parameters(classifier))
    head = {id(p) for p in model.upper.timm_model.get_classifier().parameters()}
    assert {id(p) for p in model.head_parameters("upper")} == head
    model.save_pretrained(tmp_path / "both")
    both = BiSSLModel.from_pretrained(tmp_path / "both")
    assert same_weights(both, model)
    assert both.shared_parameter_names == model.shared_parameter_names

    pixels = images(classifier, rows=4)
    with torch.no_grad():
        expected = classifier(pixels).logits
        torch.testing.assert_close(model.eval()(pixel_values=pixels).logits, expected)
    lower.eval()(pixel_values=torch.stack([pixels, pixels.flip(-1)], dim=1)).loss.backward()
    exported = model.export(tmp_path / "aligned", recalibrate_on=[{"pixel_values": pixels}])
    native = AutoModelForImageClassification.from_pretrained(tmp_path / "aligned")
    assert same_weights(native, exported)
    assert native.config.id2label == dict(enumerate(NAMES))
    assert same_weights(load_backbone(str(tmp_path / "aligned")), load_backbone(exported))


@timm
def test_features(classifier: PreTrainedModel) -> None:
    pixels = images(classifier)
    seen = []
    classifier.timm_model.get_classifier().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        classifier(pixels)
    batches = [{"pixel_values": pixels, "labels": torch.tensor([0, 1])}]
    for model in (classifier, load_backbone(classifier)):
        torch.testing.assert_close(torch.tensor(extract_features(model.eval(), batches)[0]), seen[0])
    assert infer_feature_size(classifier.config) == seen[0].shape[1]


@timm
@pytest.mark.parametrize("task", ["byol", "vicreg", "barlow_twins"])
def test_other_pretext_tasks(task: str, classifier: PreTrainedModel) -> None:
    sizes: dict[str, Any] = {"projection_dims": (5, 4), **({"predictor_dims": (5, 4)} if task == "byol" else {})}
    model = build_pretext_model(task, classifier, **sizes)
    pixels = images(classifier, rows=4)
    model(pixel_values=torch.stack([pixels, pixels.flip(-1)], dim=1)).loss.backward()
    pair = BiSSLModel.from_models(model, classifier_on(model, NAMES))
    assert set(pair.shared_parameter_names) == set(backbone_parameters(classifier))


@timm
def test_other_channels(tmp_path: Path) -> None:
    config = config_of("test_resnet", model_args={"in_chans": 1})
    model = BiSSLModel.from_backbone(AutoModel.from_config(config), num_labels=2, projection_dims=(5, 4))
    assert model.upper(torch.rand(2, 1, 32, 32)).logits.shape == (2, 2)


@timm
def test_fine_tuning_starts_from_a_folder_of_timm(classifier: PreTrainedModel, tmp_path: Path) -> None:
    """As timm writes it: a `config.json` without a model type."""
    classifier.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("model_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    built = classifier_builder(StartArguments(model=str(tmp_path)), ["a", "b"])()
    own = backbone_parameters(built)
    assert all(torch.equal(p, own[name]) for name, p in backbone_parameters(classifier).items())
    assert built(images(built)).logits.shape == (2, 2)
