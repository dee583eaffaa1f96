"""Classifiers with a new head on a backbone, and both levels on one."""

import pytest
import torch
from transformers import BertConfig, ResNetForImageClassification, ResNetModel

from bissl_hf import BiSSLModel, load_image_task
from bissl_hf.models.classifier import classifier_on, labels_of_task, new_classifier

from ..conftest import tiny_resnet_config


def test_a_classifier_takes_the_weights_of_a_backbone_and_names_its_classes() -> None:
    source = ResNetModel(tiny_resnet_config())
    model = classifier_on(source, ["ant", "bee"])
    assert isinstance(model, ResNetForImageClassification)
    assert (model.config.id2label, model.config.problem_type) == (
        {0: "ant", 1: "bee"},
        "single_label_classification",
    )
    for name, value in model.resnet.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"of type 'bert', on which transformers has no image classifier"):
        new_classifier(BertConfig(), ["a", "b"])
    del source.embedder
    with pytest.raises(ValueError, match=r"a ResNetModel, lacks 6 of the parameters of ResNetForImageClassification"):
        classifier_on(source, ["a", "b"])


def test_both_levels_start_from_one_backbone() -> None:
    source = ResNetModel(tiny_resnet_config())
    model = BiSSLModel.from_backbone(source, id2label={0: "ant", 1: "bee"}, projection_dims=(6, 5))
    for level in ("lower", "upper"):
        for name, value in getattr(model, level).base_model.state_dict().items():
            assert torch.equal(value, source.state_dict()[name]), name
    assert model.upper.config.label2id == {"ant": 0, "bee": 1}
    model = BiSSLModel.from_backbone(source, num_labels=4, pretext="vicreg", projection_dims=(6, 5))
    assert model.upper.config.num_labels == 4
    task = load_image_task("digits", image_size=8)
    assert BiSSLModel.from_backbone(source, task=task, projection_dims=(6, 5)).upper.config.num_labels == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Of id2label, num_labels and task none is given; give one"),
        ({"id2label": {0: "a"}, "num_labels": 1}, "Of id2label, num_labels and task id2label and num_labels is given"),
        ({"num_labels": 0}, "num_labels is 0; it must be an integer of at least 1"),
        ({"id2label": {1: "a"}}, r"id2label has the numbers \[1\]; they must be 0, 1, \.\.\."),
    ],
)
def test_what_describes_no_classes_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        labels_of_task(**{"id2label": None, "num_labels": None, "task": None, **given})
