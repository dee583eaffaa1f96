"""The conversion as users start it: released weights to checkpoints and back."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from bissl_hf import SimCLRForPreTraining
from bissl_hf.cli import convert, running

from ..models.test_timm_resnet import plain_resnet, projection_head
from .runs import ROOT, as_arguments, refusal

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def released(bottleneck: bool = False) -> tuple[dict[str, torch.Tensor], Any, Any]:
    """A state dict as it is released, its backbone and its head."""
    backbone = plain_resnet(bottleneck=bottleneck).float()
    head = projection_head(64 if bottleneck else 16).eval()
    weights = {f"module.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    return weights | {f"module.head.{name}": tensor for name, tensor in head.state_dict().items()}, backbone, head


def run(source: Path, target: Path, **options: Any) -> None:
    convert.main(as_arguments({"input": source, "output": target, **options}))


def test_released_weights_become_a_simclr_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, backbone, head = released()
    torch.save(weights, tmp_path / "released.pth")
    config = str(ROOT / "recipes" / "configs" / "paper_v2" / "convert.yaml")
    places = as_arguments({"input": tmp_path / "released.pth", "output": tmp_path / "simclr"})
    convert.main(["--config", config, *places])
    printed = capsys.readouterr().out
    assert "SimCLRForPreTraining" in printed
    assert re.search(r"projection head +7 x 6 x 5 ", printed)
    assert f"recipes/bissl.py --lower_model {tmp_path / 'simclr'}" in printed
    model = SimCLRForPreTraining.from_pretrained(tmp_path / "simclr").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.embed(IMAGES), head(backbone(IMAGES)[1]), rtol=1e-4, atol=1e-5)
    assert model.config.projection_dims == [7, 6, 5]


@pytest.mark.parametrize("bottleneck", [False, True])
def test_there_and_back_is_the_same(bottleneck: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, _, _ = released(bottleneck)
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "released.pth")
    run(tmp_path / "released.pth", tmp_path / "simclr", key="state_dict", temperature=0.2)
    assert SimCLRForPreTraining.from_pretrained(tmp_path / "simclr").config.temperature == 0.2
    prefixes = {"backbone_prefix": "module.backbone.", "head_prefix": "module.head."}
    run(tmp_path / "simclr", tmp_path / "new" / "again.pth", **prefixes)
    again = torch.load(tmp_path / "new" / "again.pth", weights_only=True)
    assert set(again) == set(weights)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.items())
    out, err = capsys.readouterr()
    assert f"{tmp_path / 'new' / 'again.pth'} holds each tensor of {tmp_path / 'simclr'} under timm's names" in out
    assert f"Checking again.pth: 100%|██████████| {len(weights)}/{len(weights)}" in err


@pytest.mark.parametrize("num_classes", [0, 3])
def test_a_backbone_and_a_classifier(num_classes: int, tmp_path: Path) -> None:
    plain = plain_resnet(bottleneck=False, num_classes=num_classes).float()
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    run(tmp_path / "plain.pth", tmp_path / "model")
    kind = AutoModelForImageClassification if num_classes else AutoModel
    model = kind.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        features = plain(IMAGES)[1]
        if num_classes:
            torch.testing.assert_close(model(IMAGES).logits, plain.fc(features), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(model(IMAGES).pooler_output.flatten(1), features, rtol=1e-4, atol=1e-5)
    run(tmp_path / "model", tmp_path / "again.pth")
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert set(again) == set(plain.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in again.items())


def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, _, _ = released()
    torch.save(weights, tmp_path / "good.pth")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "whole.pth")
    torch.save(weights | {"fc.weight": torch.ones(2, 16), "fc.bias": torch.ones(2)}, tmp_path / "both.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(print, protocol=2))
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    for source, target, options, message in (
        ("good.pth", "other.pth", {}, "one must be a file .* and the other a checkpoint"),
        ("good.pth", "full", {}, "output .*full exists already; choose another"),
        ("none.pth", "new", {}, "There is no file .*none.pth"),
        ("pickle.pth", "new", {}, "is a pickle with more in it than plain weights, and is not run"),
        ("damaged.safetensors", "new", {}, "damaged.safetensors holds no weights that can be read: "),
        ("empty.pth", "new", {}, "empty.pth holds no weights that can be read: "),
        ("list.pth", "new", {}, r"is no state dict of tensors; choose one of its entries \[\] with --key"),
        ("list.pth", "new", {"key": "model"}, "key is 'model'; .* holds list"),
        ("whole.pth", "new", {}, r"choose one of its entries \['model'\] with --key"),
        ("whole.pth", "new", {"key": "ema"}, r"key is 'ema'; .* holds \['epoch', 'model'\]"),
        ("good.pth", "new", {"head_prefix": "neck."}, "head_prefix is 'neck.'; no name of the weights begins so"),
        ("good.pth", "new", {"temperature": 0}, "temperature is 0.0; it must be above 0"),
        ("both.pth", "new", {}, "have both a projection head and a classifier fc"),
        ("vit", "new.pth", {}, "The backbone is no ResNet"),
        ("nowhere", "new.pth", {}, "input is .*nowhere'; there is no such folder. It must be a folder with"),
        ("vit", "new.pth", {"push_to_hub": True}, "push_to_hub is on and output is the file .*; only a checkpoint is"),
        ("good.pth", "new", {"license": "mine"}, "license is 'mine'; it must be an identifier that the Hub knows"),
    ):
        arguments = as_arguments({"input": tmp_path / source, "output": tmp_path / target, **options})
        sentence = refusal(capsys, convert.main, arguments)
        assert re.search(message, sentence), sentence
        assert not (tmp_path / "new").exists()


def test_numbers_that_a_checkpoint_does_not_hold_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = plain_resnet(bottleneck=False).state_dict()
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    torch.save(half, tmp_path / "half.pth")
    run(tmp_path / "half.pth", tmp_path / "half")
    wide = {name: tensor.double() / 3 if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    torch.save(wide, tmp_path / "wide.pth")
    arguments = as_arguments({"input": tmp_path / "wide.pth", "output": tmp_path / "wide"})
    with pytest.raises(SystemExit):
        convert.main(arguments)
    message = (
        "error: .*, given as torch.float64, is not the same in .*wide. Checkpoints hold float32: give weights that"
    )
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "wide").exists(), "what was refused does not look finished"


def test_the_card_says_what_is_known(tmp_path: Path) -> None:
    weights, _, _ = released()
    torch.save(weights, tmp_path / "released.pth")
    run(tmp_path / "released.pth", tmp_path / "simclr", license="mit")
    card = ModelCard.load(tmp_path / "simclr" / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "bissl_hf")
    assert card.data.tags == ["simclr", "self-supervised-learning", "bissl"]
    assert "converted, number for number, from a state dict of a ResNet under the names of [timm]" in card.text
    assert 'SimCLRForPreTraining.from_pretrained("path/to/this/folder")' in card.text
    for unknown in ("## Training", "## Evaluation", "## Citation", str(tmp_path), "released"):
        assert unknown not in card.text


def test_one_process_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(running, "PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    arguments = as_arguments({"input": tmp_path / "a.pth", "output": tmp_path / "b"})
    assert "The conversion runs on 2 processes; start it on one" in refusal(capsys, convert.main, arguments)


@pytest.mark.parametrize("name", ["released.safetensors", "released.pth.tar", "released.ckpt"])
def test_other_forms_of_released_weights(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm's weights on the Hub are safetensors; torchvision's and MoCo's scripts write `.pth.tar`."""
    weights = plain_resnet(bottleneck=False).state_dict()
    if name.endswith(".safetensors"):
        save_file(weights, tmp_path / name)
        run(tmp_path / name, tmp_path / "model")
    else:
        torch.save({"state_dict": weights, "epoch": 3}, tmp_path / name)
        run(tmp_path / name, tmp_path / "model", key="state_dict")
    run(tmp_path / "model", tmp_path / "again.safetensors")
    assert 'safetensors.torch.load_file("' in capsys.readouterr().out
    again = load_file(tmp_path / "again.safetensors")
    assert set(again) == set(weights)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in again.items())
