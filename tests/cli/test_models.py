"""Models from arguments: whose weights they hold, and what is refused."""

from pathlib import Path

import pytest
import torch
from transformers import (
    PreTrainedModel,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
)

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.cli.models import (
    PretextModelArguments,
    StartArguments,
    build_pretext_model,
    classifier_builder,
    load_classifier,
)
from bissl_hf.models.classifier import new_classifier
from bissl_hf.models.pretext import downstream_config

from ..conftest import tiny_resnet_config


def same_weights(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    others = second.state_dict()
    return all(torch.equal(value, others[name]) for name, value in first.state_dict().items())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    ResNetForImageClassification(tiny_resnet_config()).save_pretrained(folder)
    return folder


def test_a_pretext_model_is_loaded_whole(tmp_path: Path) -> None:
    model = SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny_resnet_config(), projection_dims=(6, 5)))
    model.save_pretrained(tmp_path)
    loaded = build_pretext_model(PretextModelArguments(lower_model=str(tmp_path), projection_dims=[9]))
    assert loaded.config.projection_dims == [6, 5]
    assert same_weights(loaded, model)


def test_the_task_is_that_of_the_lower_model(tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    ViTMAEConfig(**size).save_pretrained(tmp_path)
    assert PretextModelArguments().pretext_task == "simclr"
    assert PretextModelArguments(pretext="byol").pretext_task == "byol"
    for given in (None, "mae"):
        assert PretextModelArguments(pretext=given, lower_model=str(tmp_path)).pretext_task == "mae"
    with pytest.raises(ValueError, match=r"pretext is simclr, and lower_model .* is a model of mae; leave pretext"):
        _ = PretextModelArguments(pretext="simclr", lower_model=str(tmp_path)).pretext_task


def test_a_backbone_gets_a_new_head(classifier: Path) -> None:
    source = ResNetForImageClassification.from_pretrained(classifier)
    arguments = PretextModelArguments(backbone=str(classifier), projection_dims=[7, 3], temperature=0.2)
    model = build_pretext_model(arguments)
    assert same_weights(model.backbone, source.base_model)
    assert (model.config.projection_dims, model.config.temperature) == ([7, 3], 0.2)
    arguments.backbone_init = "random"
    assert not same_weights(build_pretext_model(arguments).backbone, source.base_model)


def test_a_resnet18_by_default() -> None:
    backbone = build_pretext_model(PretextModelArguments()).backbone
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 11_176_512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone_init": "zeros"}, "backbone_init is 'zeros'; it must be pretrained or random"),
        ({"lower_model": "a", "backbone": "b"}, "Both lower_model and backbone are given"),
        ({"pretext": "jigsaw"}, "pretext is 'jigsaw'; it must be one of simclr"),
        ({"lower_model": "{classifier}"}, "is a 'resnet' model; it must be one of a pretext task.*--backbone"),
    ],
)
def test_contradictions_are_refused(arguments: dict[str, str], message: str, classifier: Path) -> None:
    arguments = {name: value.format(classifier=classifier) for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        build_pretext_model(PretextModelArguments(**arguments))


def test_a_new_classifier_names_its_classes() -> None:
    model = new_classifier(tiny_resnet_config(), ["ant", "bee"])
    assert model.config.id2label == {0: "ant", 1: "bee"}
    assert model.classifier[-1].out_features == 2


def test_a_classifier_must_tell_as_many_classes_apart(classifier: Path) -> None:
    assert load_classifier(str(classifier), ["a", "b", "c"], field="upper_model").config.num_labels == 3
    with pytest.raises(ValueError, match=r"upper_model .* has 3 classes and the data set has 2; leave upper"):
        load_classifier(str(classifier), ["a", "b"], field="upper_model")


def test_a_kept_head_follows_the_names_of_the_data(classifier: Path, tmp_path: Path) -> None:
    """Same names in another order are refused; a head with other names is taken, and gets those of the data."""
    model = load_classifier(str(classifier), ["cat", "dog", "emu"], field="model")
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "emu": 2}
    model.save_pretrained(tmp_path)
    assert load_classifier(str(tmp_path), ["cat", "dog", "emu"], field="model").config.id2label[2] == "emu"
    with pytest.raises(ValueError, match=r"in another order \(cat, dog, emu, ... instead of emu, cat, dog, ...\)"):
        load_classifier(str(tmp_path), ["emu", "cat", "dog"], field="model")


def test_the_kind_of_task_decides_the_loss(classifier: Path) -> None:
    kind = "multi_label_classification"
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    for model in (
        new_classifier(tiny_resnet_config(), ["a", "b", "c"], problem_type=kind),
        load_classifier(str(classifier), ["a", "b", "c"], field="upper_model", problem_type=kind),
    ):
        found = model.eval()(pixel_values=images, labels=labels)
        probability = 1 / (1 + torch.exp(-found.logits))
        by_hand = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
        torch.testing.assert_close(found.loss, by_hand)


TINY_VIT = {
    "image_size": 8, "patch_size": 4, "num_channels": 3, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("task", ["simclr", "byol", "vicreg", "barlow_twins", "mae"])
@pytest.mark.parametrize("start", ["pretrained", "random"])
def test_every_pretext_task_is_built_saved_and_loaded_by_name(tmp_path, task, start):
    ViTForImageClassification(ViTConfig(**TINY_VIT)).save_pretrained(tmp_path / "vit")
    narrow = {"projection_dims": [8, 6]} if task in ("vicreg", "barlow_twins") else {}  # 8,192 wide otherwise
    model = build_pretext_model(
        PretextModelArguments(pretext=task, backbone=str(tmp_path / "vit"), backbone_init=start, **narrow)
    )
    model.save_pretrained(tmp_path / task)
    loaded = build_pretext_model(PretextModelArguments(lower_model=str(tmp_path / task)))
    assert type(loaded) is type(model)
    assert same_weights(loaded, model)
    trainable = [{n for n, p in each.named_parameters() if p.requires_grad} for each in (model, loaded)]
    assert trainable[0] == trainable[1]
    upper = new_classifier(downstream_config(model), ["a", "b"])
    assert type(upper).__name__ == "ViTForImageClassification"


TASK_SETTINGS = [
    ({"pretext": "moco"}, "pretext is 'moco'; it must be one of simclr, byol, vicreg, barlow_twins, mae"),
    ({"pretext": "byol", "temperature": 0.1}, "temperature is 0.1, which the pretext task byol does not have"),
    ({"pretext": "mae", "projection_dims": [4]}, "projection_dims is .4., which the pretext task mae does not have"),
    ({"mask_ratio": 0.5}, "mask_ratio is 0.5, which the pretext task simclr does not have"),
]


@pytest.mark.parametrize(("values", "message"), TASK_SETTINGS)
def test_settings_of_another_task_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        build_pretext_model(PretextModelArguments(**values))


def test_fine_tuning_starts_from_either_level(tmp_path: Path, classifier: Path) -> None:
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny_resnet_config(), projection_dims=(6, 5)))
    both = BiSSLModel.from_models(lower, ResNetForImageClassification(tiny_resnet_config()))
    with torch.no_grad():
        for parameter in both.upper.base_model.parameters():
            parameter.mul_(1.5)
    both.save_pretrained(tmp_path)
    for level, source in (("aligned", both.lower), ("upper", both.upper)):
        start = StartArguments(model=str(tmp_path), model_level=level)
        assert same_weights(classifier_builder(start, ["a", "b"])().base_model, source.base_model)
    with pytest.raises(ValueError, match=r"model_level is upper, and model .* is a 'resnet' model of one level"):
        classifier_builder(StartArguments(model=str(classifier), model_level="upper"), ["a", "b"])
