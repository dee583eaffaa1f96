"""What follows from the model that a run starts from: preprocessing, and the usual optimizers."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import ResNetForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from bissl_hf import BiSSLTrainingArguments
from bissl_hf.cli.arguments import given_fields
from bissl_hf.cli.images import CropArguments, DataArguments, build_train_transform
from bissl_hf.cli.models import PretextModelArguments, StartArguments, build_pretext_model, classifier_builder
from bissl_hf.cli.starting import StartingPoint
from bissl_hf.data.augment import EvalTransform
from bissl_hf.data.preprocessing import Preprocessing, load_preprocessing
from bissl_hf.tasks.downstream import DownstreamTask
from bissl_hf.trainer.training_args import FineTuningArguments

from ..conftest import tiny_resnet_config

TINY = {"patch_size": 4, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@dataclass
class Models:
    backbone: str | None = None
    upper_model: str | None = None


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    ViTForImageClassification(ViTConfig(**TINY, image_size=16)).save_pretrained(folder)
    processor = ViTImageProcessorPil(
        size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD, resample=2, do_rescale=True
    )
    processor.save_pretrained(folder)
    return str(folder)


def start(**models: str) -> StartingPoint:
    return StartingPoint.find(Models(**models), "backbone", "upper_model")


def test_preprocessing_is_that_of_the_image_processor(vit):
    taken = start(backbone=vit).complete(DataArguments()).preprocessing
    assert (taken.image_size, taken.mean, taken.std, taken.resample) == (16, tuple(MEAN), tuple(STD), 2)


def test_what_is_given_wins(vit):
    given = DataArguments(image_size=24, image_mean=STD, image_std=MEAN, image_resample="lanczos")
    assert start(upper_model=vit).complete(given) == given
    taken = given.preprocessing
    assert (taken.image_size, taken.mean, taken.std, taken.resample) == (24, tuple(STD), tuple(MEAN), 1)


def test_without_a_processor_the_size_is_that_of_the_configuration(tmp_path):
    assert start().complete(DataArguments()).image_size == 96
    ViTConfig(**TINY, image_size=12).save_pretrained(tmp_path / "vit")
    tiny_resnet_config().save_pretrained(tmp_path / "resnet")
    found = {name: start(backbone=str(tmp_path / name)).complete(DataArguments()) for name in ("vit", "resnet")}
    assert {name: data.image_size for name, data in found.items()} == {"vit": 12, "resnet": 96}
    assert found["vit"].image_mean == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\]; it must be 3 numbers, one per channel, finite"),
        ({"image_std": [1.0, 0.0, 1.0]}, r"image_std is \[1.0, 0.0, 1.0\]; it must be 3 numbers.*above 0"),
        ({"image_resample": "box"}, "image_resample is 'box'; it must be one of lanczos, bilinear, bicubic"),
    ],
)
def test_wrong_preprocessing_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        start().complete(DataArguments(**given))


@pytest.mark.parametrize("init", ["pretrained", "random"])
@pytest.mark.parametrize("task", ["simclr", "byol", "mae"])
def test_models_are_built_for_the_size(vit, task, init):
    lower = build_pretext_model(PretextModelArguments(pretext=task, backbone=vit, backbone_init=init), 24)
    assert (getattr(lower.config, "backbone_config", None) or lower.config).image_size == 24
    upper = classifier_builder(StartArguments(model=vit, model_init=init), ["a", "b"], image_size=24)()
    assert upper.config.image_size == 24
    with pytest.raises(ValueError, match="image_size is 18, which the patches of the vit backbone, 4 pixels wide"):
        build_pretext_model(PretextModelArguments(backbone=vit, backbone_init=init), 18)


def test_transformers_get_adamw_where_the_user_has_not_chosen(vit, tmp_path):
    args = BiSSLTrainingArguments(output_dir=str(tmp_path), use_cpu=True, lower_optim="lars", learning_rate=0.5)
    levels = {"": "", "lower_": "lower_"}
    found = start(backbone=vit).with_usual_optimizers(args, {"lower_optim", "learning_rate"}, levels)
    assert (found.optim, found.learning_rate, found.weight_decay) == ("adamw", 0.5, 0.05)
    assert (found.lower_optim, found.lower_learning_rate) == ("lars", args.lower_learning_rate)
    assert found.optimizer_options == {}
    level = found.level("upper")
    assert (level.optim, level.learning_rate, level.weight_decay) == ("adamw", 0.5, 0.05)
    found = start(backbone=vit).with_usual_optimizers(args, {}, levels)
    assert (found.lower_optim, found.lower_learning_rate, found.lower_weight_decay) == ("adamw", 1e-4, 0.05)


def test_networks_with_batch_norm_keep_the_defaults(tmp_path, capsys):
    ResNetForImageClassification(tiny_resnet_config()).save_pretrained(tmp_path)
    args = FineTuningArguments(output_dir=str(tmp_path), use_cpu=True)
    point = start(backbone=str(tmp_path))
    assert point.with_usual_optimizers(args, {}, {"": ""}) is args
    point.print_choices(point.complete(DataArguments()), args, to=args)
    assert "Optimizers" not in capsys.readouterr().out


def test_what_was_taken_is_said_in_two_lines(vit, tmp_path, capsys):
    point = start(backbone=vit)
    args = point.with_usual_optimizers(
        FineTuningArguments(output_dir=str(tmp_path), use_cpu=True), {"learning_rate"}, {"": ""}
    )
    point.print_choices(point.complete(DataArguments()), args, to=args)
    images, optimizers = " ".join(capsys.readouterr().out.split()).split(" Optimizers: ")
    assert images == (
        "Images: 16 x 16 pixels, bilinear, mean 0.1 0.2 0.3, deviation 0.4 0.5 0.6; settings that are not given are "
        f"those of {vit}."
    )
    assert optimizers == (
        "optim adamw, learning_rate 0.01, weight_decay 0.05; settings that are not given are the usual ones of vit."
    )


def test_given_fields_are_those_of_the_command_line_and_of_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("optim: adamw\nseed: null\nweight_decay: 0.1\n")
    given = given_fields(["--config", str(config), "--learning-rate", "-1", "--image_mean=0.5", "0.5"])
    assert given == {"optim", "weight_decay", "learning_rate", "image_mean"}


def test_the_exported_processor_says_the_same(vit, tmp_path):
    data = start(backbone=vit).complete(DataArguments(image_size=24))
    crops = CropArguments()
    task = DownstreamTask(
        "single_label_classification", ["a", "b"], data.preprocessing, build_train_transform(data.preprocessing, crops)
    )
    task.trainer_arguments()["processing_class"].save_pretrained(tmp_path)
    assert load_preprocessing(str(tmp_path)) == data.preprocessing == Preprocessing(tuple(MEAN), tuple(STD), 24, 2)
    image = torch.randint(0, 256, (1, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    middle = EvalTransform(24)({"pixel_values": image}, ())["pixel_values"]
    usual, own = (
        torch.tensor(values).view(2, 3, 1, 1)
        for values in ([IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD], [MEAN, STD])
    )
    found = EvalTransform.from_processor(data.preprocessing, resample=3)({"pixel_values": image}, ())["pixel_values"]
    torch.testing.assert_close(found, (middle * usual[1] + usual[0] - own[0]) / own[1])
