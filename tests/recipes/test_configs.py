"""Every configuration is taken by the recipe it is for, and those of the paper hold its values."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from bissl_hf.data.catalogue import CATALOGUE

from .runs import ROOT

FOLDER = ROOT / "recipes" / "configs"
CONFIGS = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.yaml"))
DEBIAN = "/usr/share/datasets/fashion-mnist"  # where the package dataset-fashion-mnist puts it
MADE = ("outputs/emoji", "my_images", "my_texts/labelled.csv")  # by recipes/make_emoji.py, and by users
STAGES = ("bissl", "pretrain", "joint", "finetune", "analyze", "study", "convert", "text")
COMMANDS = {"bissl": "align", "text": "align_text"}


class StopError(Exception):
    """Ends a recipe once its arguments are there."""


def parse(config: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The fields that the configuration's recipe, named by its file, reads from it."""
    stage = next((word for word in Path(config).stem.split("_") if word in STAGES), "bissl")
    recipe = importlib.import_module(f"bissl_hf.cli.{COMMANDS.get(stage, stage)}")
    parse_arguments = recipe.parse_arguments

    def stop(*args: Any, **kwargs: Any) -> None:
        raise StopError(parse_arguments(*args, **kwargs))

    monkeypatch.setattr(recipe, "parse_arguments", stop)
    with pytest.raises(StopError) as parsed:
        recipe.main(["--config", str(FOLDER / config)])
    return {name: value for part in parsed.value.args[0] for name, value in vars(part).items()}


@pytest.mark.parametrize("config", CONFIGS)
def test_recipes_take_their_configurations(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = parse(config, monkeypatch)
    if "convert" not in config:
        assert {*fields.get("datasets", [fields.get("dataset")])} <= {
            "digits",
            "mnist_5000",
            DEBIAN,
            *MADE,
            *CATALOGUE,
        }


# What section 4 and the appendix of the paper say, stage by stage.
SCHEDULE = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.001}}
VIEWS = {"image_size": 96, "color_jitter": 0.8, "grayscale": 0.2, "blur": [1.0, 0.1], "solarize": [0.0, 0.2]}
PAPER: dict[str, dict[str, Any]] = {
    "pretrain": {
        **SCHEDULE,
        **VIEWS,
        "learning_rate": 4.8,
        "weight_decay": 1e-6,
        "per_device_train_batch_size": 1024,
        "num_train_epochs": 500,
        "warmup_steps": 10 * (100_000 // 1024),
        "temperature": 0.5,
        "projection_dims": [256, 256, 256],
    },
    "bissl": {
        **SCHEDULE,
        **VIEWS,
        "num_alternations": 500,
        "lower_steps": 20,
        "upper_steps": 8,
        "proximal_weight": 0.001,
        "damping": 10,
        "direct_weight": 0.01,
        "solver_max_iterations": 5,
        "lower_learning_rate": 1.0,
        "lower_warmup_steps": 10 * (100_000 // 1024),
        "per_device_lower_batch_size": 1024,
        "per_device_train_batch_size": 256,
        "learning_rate": 0.015,
        "weight_decay": 0.01,
        "max_grad_norm": 10,
        "lower_max_grad_norm": 10,
        "head_warmup_epochs": 20,
    },
    "finetune": {
        "image_size": 96,
        "search_trials": 200,
        "search_learning_rate": [1e-4, 1],
        "search_weight_decay": [1e-5, 1e-2],
        "seeds": 10,
        "num_train_epochs": 400,
        "per_device_train_batch_size": 256,
        "lr_scheduler_type": "cosine",
        "optim_args": "momentum=0.9",
    },
}


@pytest.mark.parametrize("stage", PAPER)
def test_configurations_of_the_paper_hold_its_values(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = parse(f"paper_v2/{stage}.yaml", monkeypatch)
    assert {name: fields[name] for name in PAPER[stage]} == PAPER[stage]


def test_each_stage_starts_from_what_the_one_before_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = parse("paper_v2/pretrain.yaml", monkeypatch)["output_dir"]
    aligned = parse("paper_v2/bissl.yaml", monkeypatch)
    assert aligned["lower_model"] == written == parse("paper_v2/convert.yaml", monkeypatch)["output"]
    assert parse("paper_v2/finetune.yaml", monkeypatch)["model"] == aligned["output_dir"]


# Upper learning rate and weight decay of each set in the authors' last code: with SimCLR, with BYOL.
V5_CHOICES = {
    "aircraft": (0.03, 5e-3, 0.015, 3e-3), "caltech101": (0.03, 1e-4, 0.015, 2e-4), "cars": (0.035, 1e-3, 0.04, 2e-3),
    "cifar10": (0.015, 1e-3, 0.01, 1e-3), "cifar100": (0.01, 1e-4, 0.01, 1e-3), "cub200": (0.03, 1e-3, 0.015, 1e-4),
    "dtd": (0.03, 1e-3, 0.015, 1e-4), "flowers102": (0.05, 5e-4, 0.035, 2e-3), "food101": (0.03, 1e-3, 0.035, 2e-3),
    "pets": (0.03, 1e-3, 0.02, 2e-3), "sun397": (0.015, 5e-5, 0.01, 5e-5), "voc2007": (0.015, 5e-3, 0.005, 6e-3),
}  # fmt: skip


@pytest.mark.parametrize(("task", "column"), [("simclr", 0), ("byol", 2)])
def test_the_later_version_has_settings_for_each_set(task, column, monkeypatch):
    table = {}
    for line in (FOLDER / f"paper_v5/{task}_bissl.yaml").read_text().splitlines():
        if line.startswith("#   --"):
            options = dict(zip(line.split()[1::2], line.split()[2::2], strict=True))
            table[options["--dataset"]] = (float(options["--learning_rate"]), float(options["--weight_decay"]))
    assert table == {name: values[column : column + 2] for name, values in V5_CHOICES.items()}
    fields = parse(f"paper_v5/{task}_bissl.yaml", monkeypatch)
    assert (fields["learning_rate"], fields["weight_decay"]) == table[fields["dataset"]]
    assert (fields["direct_weight"], fields["pretext"], fields["restart_target"]) == (1.0, task, task == "byol")
    pretrain = parse(f"paper_v5/{task}_pretrain.yaml", monkeypatch)
    assert pretrain["warmup_steps"] == 10 * (1_281_167 // 1024)
    assert pretrain["output_dir"] == fields["lower_model"]
    assert parse(f"paper_v5/{task}_finetune.yaml", monkeypatch)["model"] == fields["output_dir"]


@pytest.mark.parametrize("config", [name for name in CONFIGS if name.startswith("paper_v")])
def test_every_field_of_the_paper_has_its_source(config: str) -> None:
    for line in (FOLDER / config).read_text().splitlines():
        name = line.partition(":")[0]
        if line and not line.startswith("#") and name not in ("output_dir", "save_strategy", "save_total_limit"):
            assert "  # " in line, line
