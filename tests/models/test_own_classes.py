"""Models of the user's own classes as levels: saved by name, loaded from the class, never imported by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification, ResNetModel
from transformers.modeling_outputs import ImageClassifierOutput

from bissl_hf import BiSSLConfig, BiSSLModel
from bissl_hf.models import auto
from bissl_hf.models.auto import register_class, resolve_class

from ..conftest import tiny_resnet_config


class RotationConfig(ResNetConfig):
    model_type = "rotation-of-the-tests"


class Rotation(PreTrainedModel):
    """Predicts by how many quarters an image has been turned."""

    config_class = RotationConfig
    base_model_prefix = "resnet"
    main_input_name = "pixel_values"

    def __init__(self, config: RotationConfig) -> None:
        super().__init__(config)
        self.resnet = ResNetModel(config)
        self.head = nn.Linear(config.hidden_sizes[-1], 4)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        logits = self.head(self.resnet(pixel_values).pooler_output.flatten(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def rotation_pair() -> BiSSLModel:
    torch.manual_seed(0)
    lower = Rotation(RotationConfig(**{k: v for k, v in tiny_resnet_config().to_dict().items() if k != "model_type"}))
    return BiSSLModel.from_models(lower, ResNetForImageClassification(tiny_resnet_config()))


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process: no class has been passed."""
    monkeypatch.setattr(auto, "_passed_classes", {})


@pytest.fixture
def folder(tmp_path: Path, forget: None) -> Path:
    rotation_pair().save_pretrained(tmp_path)
    auto._passed_classes.clear()
    return tmp_path


def test_a_class_of_ones_own_is_saved_by_its_full_name(forget: None, tmp_path: Path) -> None:
    model = rotation_pair()
    assert type(model.lower) is Rotation
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["lower_class"], config["upper_class"]) == (f"{__name__}.Rotation", "ResNetForImageClassification")
    # The process that has joined the models knows the class, as a trainer that resumes must.
    assert type(BiSSLModel.from_pretrained(tmp_path).lower.config) is RotationConfig


def test_it_is_loaded_from_the_class(folder: Path) -> None:
    model = rotation_pair()
    auto._passed_classes.clear()
    loaded = BiSSLModel.from_pretrained(folder, lower_class=Rotation)
    assert type(loaded.lower) is Rotation
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    inputs = {"pixel_values": torch.rand(2, 1, 8, 8), "labels": torch.tensor([0, 3])}
    assert torch.equal(loaded.eval()(level="lower", **inputs).loss, model.eval()(level="lower", **inputs).loss)


def test_a_class_that_has_moved_is_loaded_by_its_last_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rotation, "__module__", "elsewhere")
    loaded = BiSSLModel.from_pretrained(folder, lower_class=Rotation)
    assert loaded.config.lower_class == "elsewhere.Rotation"


def test_without_the_class_one_sentence_says_what_to_pass(folder: Path) -> None:
    message = (
        rf"lower_class is '{__name__}\.Rotation', a class that is neither of transformers nor of bissl_hf.*"
        r"BiSSLModel\.from_pretrained\(\.\.\., lower_class=Rotation\)"
    )
    for load in (BiSSLModel.from_pretrained, BiSSLConfig.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(folder)


def test_another_class_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"lower_class is ResNetModel, and the checkpoint .* with .*\.Rotation"):
        BiSSLModel.from_pretrained(folder, lower_class=ResNetModel)
    with pytest.raises(TypeError, match=r"is no model class; it must be a subclass of transformers' PreTrainedModel"):
        BiSSLModel.from_pretrained(folder, lower_class=nn.Linear)


def test_a_class_that_borrows_a_known_name_keeps_its_own(forget: None) -> None:
    class Borrowed(ResNetForImageClassification):
        pass

    Borrowed.__name__ = "ResNetForImageClassification"
    name = register_class(Borrowed)
    assert name.startswith(f"{__name__}.")
    assert resolve_class(name) is Borrowed
    assert resolve_class("ResNetForImageClassification") is ResNetForImageClassification


NAMED = """
import sys
from transformers.utils import logging
from bissl_hf import BiSSLModel
for source in sys.argv[1:]:
    try:
        BiSSLModel.from_pretrained(source)
    except ValueError as error:
        print(error)
assert not {"stranger", "antigravity", "this"} & set(sys.modules), "imported"
"""


def test_a_name_in_a_checkpoint_imports_nothing(folder: Path) -> None:
    """Modules on the path run code when they are imported; those that a checkpoint names must not be."""
    (folder / "stranger.py").write_text("import pathlib\npathlib.Path(__file__).with_name('run').touch()\n")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    sources = []
    for number, name in enumerate(
        ("stranger.Rotation", "stranger", "this.s", "antigravity", "transformers.os.system")
    ):
        source = folder / str(number)
        source.mkdir()
        (source / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        auto_map = {"AutoModel": "stranger.Rotation", "AutoConfig": "stranger.RotationConfig"}
        level = {**config["lower_config"], "model_type": "resnet", "auto_map": auto_map}
        written = {**config, "lower_class": name, "lower_config": level, "auto_map": auto_map}
        (source / "config.json").write_text(json.dumps(written))
        sources.append(str(source))
    result = subprocess.run(
        [sys.executable, "-c", NAMED, *sources], capture_output=True, text=True, cwd=folder, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("lower_class is ") == len(sources)
    assert not (folder / "run").exists()
