"""Models that cannot be loaded: the error names the argument, what is there, and what is allowed."""

import json
from pathlib import Path

import pytest

from bissl_hf.cli.loading import load_config, loading
from bissl_hf.cli.models import (
    PretextModelArguments,
    StartArguments,
    build_pretext_model,
    classifier_builder,
    load_classifier,
)

from ..conftest import tiny_resnet_config
from ..hub_stand_in import HubStandIn

ALLOWED = r"It must be a folder with a config.json and weights, or the id of a model at the Hub, such as user/name\."
NAMES = ["ant", "bee", "cow"]
LOADERS = {
    "lower_model": lambda source: build_pretext_model(PretextModelArguments(lower_model=source)),
    "backbone": lambda source: build_pretext_model(PretextModelArguments(backbone=source)),
    "upper_model": lambda source: load_classifier(source, NAMES, field="upper_model"),
    "model": lambda source: classifier_builder(StartArguments(model=source), NAMES),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of which none holds a model."""
    root = tmp_path_factory.mktemp("folders")
    contents = {
        "empty": {},
        "unreadable": {"config.json": "{"},
        "unknown": {"config.json": "{}"},
        "bare": {"config.json": json.dumps(tiny_resnet_config().to_dict())},
        "broken": {"config.json": json.dumps(tiny_resnet_config().to_dict()), "model.safetensors": "abc"},
    }
    for name, files in contents.items():
        (root / name).mkdir()
        for file, content in files.items():
            (root / name / file).write_text(content)
    return root


@pytest.mark.parametrize("field", LOADERS)
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("none", "there is no such folder"),
        ("empty", "a folder without a config.json"),
        ("unreadable", "a folder that cannot be loaded: It looks like the config file .* is not a valid JSON file"),
        ("unknown", "a folder that cannot be loaded: Unrecognized model"),
    ],
)
def test_a_folder_without_a_model_is_named_with_its_argument(field: str, name: str, found: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is '{folders / name}'[;,] {found}.* {ALLOWED}$"):
        LOADERS[field](str(folders / name))


@pytest.mark.parametrize("field", ["backbone", "upper_model", "model"])
@pytest.mark.parametrize(("name", "found"), [("bare", "no file named model"), ("broken", "deserializing header")])
def test_a_folder_without_weights_likewise(field: str, name: str, found: str, folders: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is .*; a folder that cannot be loaded: .*{found}.* {ALLOWED}$"):
        LOADERS[field](str(folders / name))


def test_a_name_that_the_hub_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path)
        message = "model is 'user/none'; there is no such folder, and what the Hub has of that name cannot be loaded"
        with pytest.raises(ValueError, match=f"{message}: user/none is not a local folder.* {ALLOWED}"):
            load_config("model", "user/none")


def test_an_assertion_of_a_model_class_is_one_sentence(tmp_path: Path) -> None:
    """As `RagModel` makes it where a checkpoint names it with another class's configuration."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model is .*has to be of type RagConfig"), loading("model", str(tmp_path)):
        raise AssertionError("config has to be of type RagConfig")
