"""Tasks as one object: their data, transforms and metrics, and what each trainer takes from them."""

from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from transformers import EvalPrediction, ResNetModel, ViTConfig, ViTImageProcessorPil, ViTModel

from bissl_hf import (
    BiSSLModel,
    BiSSLTrainer,
    BiSSLTrainingArguments,
    EvalTransform,
    FineTuneTrainer,
    FineTuningArguments,
    JointTrainer,
    JointTrainingArguments,
    PretextTrainer,
    PretextTrainingArguments,
    load_image_task,
)
from bissl_hf.data.one_view import OneViewTransform

from ..conftest import tiny_resnet_config

BASIC = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no"}


def pictures(count: int, *, labelled: bool = True, classes: int = 2) -> datasets.Dataset:
    generator = np.random.default_rng(count)
    images = [PIL.Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(count)]
    names = ["ant", "bee", "cat"][:classes]
    features = {"image": datasets.Image(), **({"label": datasets.ClassLabel(names=names)} if labelled else {})}
    labels = {"label": [row % classes for row in range(count)]} if labelled else {}
    return datasets.Dataset.from_dict({"image": images, **labels}, features=datasets.Features(features))


@pytest.fixture(scope="module")
def task():
    return load_image_task(pictures(20), unlabeled=pictures(9, labelled=False), image_size=8)


def tiny_bissl(task) -> BiSSLModel:
    torch.manual_seed(0)
    config = tiny_resnet_config()
    config.num_channels = 3
    return BiSSLModel.from_backbone(ResNetModel(config), task=task, projection_dims=(6, 5))


def test_a_task_holds_data_transforms_and_names(task):
    sizes = {name: len(getattr(task, name)) for name in ("train", "validation", "test", "unlabeled")}
    assert sizes == {"train": 16, "validation": 2, "test": 2, "unlabeled": 9}
    assert (task.class_names, task.problem_type, task.metric) == (
        ["ant", "bee"],
        "single_label_classification",
        "accuracy",
    )
    assert task.image_processor.crop_size == {"height": 8, "width": 8}
    scores = np.eye(2)[[0, 1, 1, 1]]
    assert task.compute_metrics(EvalPrediction(scores, np.array([0, 1, 1, 0])))["accuracy"] == 0.75
    views = task.view_transform({"pixel_values": task.unlabeled[0]["pixel_values"][None]}, (0, 0))
    assert views["pixel_values"].shape == (1, 2, 3, 8, 8)


def test_without_unlabelled_images_the_training_images_are_taken():
    task = load_image_task(pictures(20).with_transform(dict), image_size=8, pretext="mae")
    assert len(task.unlabeled) == len(task.train)
    assert task.unlabeled.labels is None
    assert isinstance(task.view_transform, OneViewTransform)


def write_vit(folder: Path, *, mean: float) -> str:
    """Writes a ViT for images of 16 pixels with an image processor, and returns the name of the folder."""
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    ViTModel(ViTConfig(image_size=16, patch_size=4, **size), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[mean] * 3, image_std=[0.5] * 3).save_pretrained(
        folder
    )
    return str(folder)


def test_what_a_backbone_expects_of_its_images_is_taken(tmp_path):
    source = write_vit(tmp_path, mean=0.25)
    task = load_image_task(pictures(20), processor=source, class_weights="balanced")
    assert task.image_size == 16
    assert list(task.image_processor.image_mean) == [0.25] * 3
    assert task.trainer_arguments()["class_weights"] == "balanced"
    grey = {"pixel_values": torch.full((1, 3, 18, 18), 128, dtype=torch.uint8)}
    seen = {(128 / 255 - 0.25) / 0.5}
    for transform in (task.train_transform, task.trainer_arguments()["eval_transform"]):
        assert transform(grey, (0, 0))["pixel_values"].unique().tolist() == pytest.approx(list(seen))
    assert load_image_task(pictures(20), processor=source, image_size=8).image_size == 8
    (tmp_path / "preprocessor_config.json").unlink()
    assert load_image_task(pictures(20), processor=source).image_size == 16


def test_a_backbone_takes_images_of_the_size_of_a_task(tmp_path, caplog):
    source = write_vit(tmp_path, mean=0.25)
    task = load_image_task(pictures(20), processor=source, image_size=8)
    model = BiSSLModel.from_backbone(source, task=task, projection_dims=(6, 5))
    assert model.upper.config.image_size == 8
    assert model.upper(pixel_values=torch.zeros(1, 3, 8, 8)).logits.shape == (1, 2)
    assert not caplog.records


def test_another_normalisation_than_that_of_the_backbone_is_named(tmp_path, task, caplog):
    source = write_vit(tmp_path, mean=0.25)
    BiSSLModel.from_backbone(source, task=task, projection_dims=(6, 5))
    (record,) = caplog.records
    assert "mean 0.485 0.456 0.406" in record.message
    assert f"expects mean 0.25 0.25 0.25 and deviation 0.5 0.5 0.5; pass processor='{source}'" in record.message


def test_what_is_no_task_is_refused():
    with pytest.raises(ValueError, match=r"image_size is not given; give the side of the images in pixels"):
        load_image_task(pictures(6))
    with pytest.raises(ValueError, match=r"pretext is 'jigsaw'; it must be one of simclr"):
        load_image_task("nowhere", image_size=8, pretext="jigsaw")
    with pytest.raises(ValueError, match=r"The data set has a single class, 'ant'; a classifier needs at least two"):
        load_image_task(pictures(6, classes=1), image_size=8)
    with pytest.raises(ValueError, match=r"\['revision'\] apply to data sets on the Hub only.*in memory"):
        load_image_task(pictures(6), image_size=8, revision="main")


def test_every_trainer_takes_a_task_and_reports_accuracy(task, tmp_path):
    model = tiny_bissl(task)
    settings = {"per_device_train_batch_size": 8, **BASIC}
    pretext = PretextTrainer(
        model.lower, PretextTrainingArguments(str(tmp_path / "p"), max_steps=1, **settings), task=task
    )
    pretext.train()
    bilevel = BiSSLTrainer(
        model,
        BiSSLTrainingArguments(
            str(tmp_path / "b"), num_alternations=1, lower_steps=1, upper_steps=1, head_warmup_epochs=0,
            per_device_lower_batch_size=8, solver="identity", **settings,
        ),
        task=task,
    )  # fmt: skip
    joint = JointTrainer(
        tiny_bissl(task),
        JointTrainingArguments(str(tmp_path / "j"), max_steps=1, eval_strategy="epoch", **settings),
        task=task,
    )
    tuned = FineTuneTrainer(
        model=model.upper, args=FineTuningArguments(str(tmp_path / "f"), max_steps=1, **settings), task=task
    )
    for trainer in (bilevel, joint, tuned):
        trainer.train()
        assert any("eval_accuracy" in row for row in trainer.state.log_history), type(trainer)
        assert trainer.processing_class.crop_size == {"height": 8, "width": 8}
        # A plain data set with a column of images goes where a decoded one goes.
        assert 0 <= trainer.evaluate(pictures(4))["eval_accuracy"] <= 1


def test_what_is_given_beside_a_task_counts(task, tmp_path):
    args = FineTuningArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=4, **BASIC)
    trainer = FineTuneTrainer(
        model=tiny_bissl(task).upper,
        args=args,
        task=task,
        train_dataset=task.test,
        eval_dataset=None,
        eval_transform=EvalTransform(8),
    )
    assert trainer.train_dataset is task.test
    assert trainer.eval_dataset is None
    assert trainer.compute_metrics is not None


@pytest.mark.parametrize(
    ("cls", "arguments"), [(BiSSLTrainer, BiSSLTrainingArguments), (PretextTrainer, PretextTrainingArguments)]
)
def test_another_kind_of_task_is_refused(cls, arguments, tmp_path):
    with pytest.raises(TypeError, match=rf"task is a str; {cls.__name__} takes an ImageTask \(see load_image_task\)"):
        cls(None, arguments(str(tmp_path), **BASIC), task="digits")


def test_data_that_are_missing_are_asked_for(task, tmp_path):
    args = FineTuningArguments(str(tmp_path), **BASIC)
    with pytest.raises(ValueError, match=r"train_dataset is missing; it is needed for training"):
        FineTuneTrainer(model=tiny_bissl(task).upper, args=args)
