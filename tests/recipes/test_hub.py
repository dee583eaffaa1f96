"""Recipes at the Hub: data and models from it, pushes to it, a run that goes on from it alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetForImageClassification, pipeline

from bissl_hf import BiSSLModel, SimCLRForPreTraining
from bissl_hf.cli import align, convert, finetune, pretrain

from ..hub_stand_in import HubStandIn
from . import runs
from .test_convert import released

FINETUNE = {
    "backbone": None,
    "projection_dims": None,
    "model": "user/backbone",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 12,
}
PRETRAIN = {"num_train_epochs": 1, "per_device_train_batch_size": 12}
BISSL = {
    "num_alternations": 2,
    "lower_steps": 2,
    "upper_steps": 2,
    "per_device_lower_batch_size": 12,
    "per_device_train_batch_size": 12,
    "pretrain_steps": 2,
    "head_warmup_epochs": 1,
    "proximal_weight": 1.0,
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The stand-in with a data set of images and a backbone."""
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        hub.add_folder("user/images", runs.write_splits(tmp_path / "images"), kind="dataset", private=True)
        ResNetForImageClassification(runs.resnet_config()).save_pretrained(tmp_path / "backbone")
        hub.add_folder("user/backbone", tmp_path / "backbone", private=True)
        yield hub


def settings(output: Path, **changes: Any) -> list[str]:
    return runs.as_arguments(
        {
            "dataset": "user/images",
            "backbone": "user/backbone",
            "projection_dims": [6, 5],
            "image_size": 16,
            "output_dir": output,
            "per_device_eval_batch_size": 12,
            "push_to_hub": True,
            "hub_private_repo": True,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


def weights(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: data for path, data in files.items() if path.endswith(".safetensors")}


@pytest.mark.slow
def test_a_pretext_model_goes_up_and_serves_bissl_which_goes_up_too(hub: HubStandIn, tmp_path: Path, capsys) -> None:
    pretrain.main(settings(tmp_path / "simclr", **PRETRAIN))
    assert "Pushed to the Hub: user/simclr" in capsys.readouterr().out
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "all_results.json"} <= set(
        hub.files("user/simclr")
    )
    assert SimCLRForPreTraining.from_pretrained("user/simclr").config.projection_dims == [6, 5]
    changes = {**BISSL, "backbone": None, "lower_model": "user/simclr", "pretrain_steps": None}
    align.main(settings(tmp_path / "run", **changes, hub_model_id="user/aligned"))
    files = hub.files("user/aligned")
    assert hub.repositories["model", "user/aligned"].private
    messages = [commit.message for commit in hub.commits("user/aligned")]
    assert (messages[0], messages[-1]) == ("initial commit", "End of training")
    assert {"figures/training.png", "figures/tsne.png", "README.md", "all_results.json"} <= set(files)
    assert not [path for path in files if "checkpoint" in path or "before" in path]
    classify = pipeline("image-classification", model="user/aligned")
    image = next((tmp_path / "images" / "test" / "dog").iterdir())
    assert {answer["label"] for answer in classify(str(image))} == set(runs.CLASSES)
    assert BiSSLModel.from_pretrained("user/aligned", subfolder="bilevel").upper.config.num_labels == len(runs.CLASSES)


@pytest.mark.slow
def test_a_run_goes_on_from_the_hub_in_an_empty_folder_to_the_bit(
    hub: HubStandIn, tmp_path: Path, monkeypatch
) -> None:
    changes = {**BISSL, "hub_strategy": "checkpoint"}
    align.main(settings(tmp_path / "whole" / "run", **changes, hub_model_id="user/whole"))

    class KilledError(Exception):
        """The machine is gone."""

    def kill(self, checkpoint: Path) -> None:
        push(self, checkpoint)
        self.publisher.queue.wait()
        raise KilledError

    push = align.BiSSLTrainer.push_checkpoint
    monkeypatch.setattr(align.BiSSLTrainer, "push_checkpoint", kill)
    with pytest.raises(KilledError):
        align.main(settings(tmp_path / "first" / "run", **changes, hub_model_id="user/run"))
    monkeypatch.setattr(align.BiSSLTrainer, "push_checkpoint", push)
    shutil.rmtree(tmp_path / "first")
    arguments = settings(tmp_path / "second" / "run", **changes, hub_model_id="user/run", resume_from_checkpoint="hub")
    align.main(arguments)
    assert weights(hub.files("user/run")) == weights(hub.files("user/whole"))
    assert len(weights(hub.files("user/run"))) == 4  # root, both levels, checkpoint, pre-trained


def test_fine_tuning_pushes_the_model_that_it_has_chosen(hub: HubStandIn, tmp_path: Path, capsys) -> None:
    changes = {**FINETUNE, "hub_model_id": "user/tuned", "hub_private_repo": None}
    finetune.main(settings(tmp_path / "out", **changes))
    files = hub.files("user/tuned")
    assert [commit.message for commit in hub.commits("user/tuned")] == ["initial commit", "End of training"]
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "all_results.json"} <= set(files)
    assert not [path for path in files if "seed" in path or "checkpoint" in path]
    assert AutoModelForImageClassification.from_pretrained("user/tuned").config.num_labels == len(runs.CLASSES)
    assert not hub.repositories["model", "user/tuned"].private
    refused = settings(tmp_path / "new", **changes, hub_strategy="checkpoint")
    assert "hub_strategy is checkpoint; fine-tuning pushes" in runs.refusal(capsys, finetune.main, refused)


@pytest.mark.parametrize(
    ("recipe", "specific"),
    [(align, BISSL), (pretrain, PRETRAIN), (finetune, FINETUNE)],
    ids=["bissl", "pretrain", "finetune"],
)
def test_a_wrong_token_is_one_sentence_before_training(hub, tmp_path, capsys, monkeypatch, recipe, specific) -> None:
    hub.patch(monkeypatch, tmp_path / "home", "hf_wrong")
    source = "model" if recipe is finetune else "backbone"
    local = {"dataset": tmp_path / "images", source: tmp_path / "backbone"}
    sentence = runs.refusal(capsys, recipe.main, settings(tmp_path / "run", **{**specific, **local}))
    assert sentence.startswith("error: The Hub does not take pushes to run: it answered 401")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_dead_hub_costs_nothing_but_the_push(hub: HubStandIn, tmp_path: Path, capsys) -> None:
    images = {"dataset": tmp_path / "images", "backbone": tmp_path / "backbone"}
    hub.fail("500")
    pretrain.main(settings(tmp_path / "run", **images, **PRETRAIN))
    out, err = capsys.readouterr()
    assert "The pretext model is in" in out
    assert err.count("Not there yet: the model, figures/. Everything is on disk") == 1
    assert f"hf upload run {tmp_path / 'run' / 'unpushed'} . --private" in err
    assert SimCLRForPreTraining.from_pretrained(tmp_path / "run" / "unpushed")


def conversion(tmp_path: Path, **changes: Any) -> list[str]:
    """Released weights, and the command line that makes a private repository of them."""
    torch.save(released()[0], tmp_path / "released.pth")
    push = {"push_to_hub": True, "hub_private_repo": True}
    return runs.as_arguments({"input": tmp_path / "released.pth", "output": tmp_path / "out", **push, **changes})


def test_converted_weights_go_up_and_serve_as_a_pretext_model(hub: HubStandIn, tmp_path: Path, capsys) -> None:
    convert.main(conversion(tmp_path, hub_model_id="user/released"))
    assert "Pushed to the Hub: user/released" in capsys.readouterr().out
    files = hub.files("user/released")
    assert {"config.json", "model.safetensors", "README.md"} <= set(files)
    assert not [path for path in files if path.endswith((".pth", ".bin"))]
    assert [commit.message for commit in hub.commits("user/released")] == ["initial commit", "Converted weights"]
    assert hub.repositories["model", "user/released"].private
    assert 'SimCLRForPreTraining.from_pretrained("user/released")' in files["README.md"].decode()
    assert SimCLRForPreTraining.from_pretrained("user/released").config.projection_dims == [7, 6, 5]
    again = {"input": "user/released", "output": tmp_path / "again.pth"}
    convert.main(runs.as_arguments(again))
    assert len(torch.load(tmp_path / "again.pth", weights_only=True)) == len(released()[0])


def test_a_wrong_token_is_one_sentence_before_a_conversion(hub: HubStandIn, tmp_path, capsys, monkeypatch) -> None:
    hub.patch(monkeypatch, tmp_path / "home", "hf_wrong")
    sentence = runs.refusal(capsys, convert.main, conversion(tmp_path))
    assert sentence.startswith("error: The Hub does not take pushes to out: it answered 401")
    assert not (tmp_path / "out").exists()


def test_a_dead_hub_costs_a_conversion_nothing_but_the_push(hub: HubStandIn, tmp_path: Path, capsys) -> None:
    hub.fail("500")
    convert.main(conversion(tmp_path))
    out, err = capsys.readouterr()
    assert "The SimCLRForPreTraining in" in out
    assert err.count("Not there yet: the model. Everything is on disk") == 1
    assert f"hf upload out {tmp_path / 'out' / 'unpushed'} . --private" in err
    for folder in (tmp_path / "out", tmp_path / "out" / "unpushed"):
        assert SimCLRForPreTraining.from_pretrained(folder).config.projection_dims == [7, 6, 5]
