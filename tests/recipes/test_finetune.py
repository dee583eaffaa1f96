"""Fine-tuning as users start it."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.cli import finetune
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer

from . import runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per kind of model that fine-tuning starts from."""
    root = tmp_path_factory.mktemp("models")
    simclr = SimCLRForPreTraining(SimCLRConfig(backbone_config=runs.resnet_config(), projection_dims=(6, 5)))
    classifier = ResNetForImageClassification(runs.resnet_config())
    simclr.save_pretrained(root / "simclr")
    classifier.save_pretrained(root / "classifier")
    classifier.base_model.save_pretrained(root / "backbone")
    BiSSLModel.from_models(simclr, classifier).save_pretrained(root / "bilevel")
    ResNetForImageClassification(runs.resnet_config(num_labels=4)).save_pretrained(root / "four_classes")
    return root


def settings(images: Path, model: Path | None, output: Path, **changes: Any) -> list[str]:
    return runs.as_arguments(
        {
            "dataset": images,
            "model": model,
            "image_size": 16,
            "output_dir": output,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 12,
            "per_device_eval_batch_size": 12,
            "learning_rate": 0.05,
            "seed": 5,
            "use_cpu": True,
            "disable_tqdm": True,
            **changes,
        }
    )


SEARCHED = {"seeds": 2, "search_trials": 2}


@pytest.fixture(scope="module")
def finished(images: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a run, and what the run printed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, runs.printed_by(finetune.main, settings(images, models / "simclr", output, **SEARCHED))


def test_a_run_leaves_its_best_model_and_figures_for_every_seed(finished: tuple[Path, str]) -> None:
    output, printed = finished
    results = json.loads((output / "all_results.json").read_text())
    assert results["seeds"] == [5, 6]
    accuracy = results["test_accuracy"]
    assert accuracy["mean"] == pytest.approx(sum(accuracy["values"]) / 2)
    assert accuracy["std"] == pytest.approx(abs(accuracy["values"][0] - accuracy["values"][1]) / 2**0.5)
    assert [trial["learning_rate"] for trial in results["search"]].count(results["learning_rate"]) == 1
    assert results["best_seed"] in (5, 6)
    best = output / f"seed-{results['best_seed']}" / "model"
    assert (output / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    assert AutoModelForImageClassification.from_pretrained(output).config.id2label == dict(enumerate(runs.CLASSES))
    assert {path.name for path in (output / "figures").iterdir()} == {"finetuning.png", "search.png"}
    values = ", ".join(f"{100 * value:.2f}" for value in accuracy["values"])
    assert re.search(
        rf"test +accuracy +24 +{100 * accuracy['mean']:.2f} % +{100 * accuracy['std']:.2f} % +{values}", printed
    )
    assert "chosen among 2 pairs on the validation split" in " ".join(printed.split())


def test_the_model_card_is_that_of_the_best_seed(finished: tuple[Path, str], images: Path) -> None:
    output, _ = finished
    results = json.loads((output / "all_results.json").read_text())
    card = ModelCard.load(output / "README.md")
    best = results["seeds"].index(results["best_seed"])
    trained = json.loads((output / f"seed-{results['best_seed']}" / "result.json").read_text())
    loss = results["test_loss"]
    assert loss["values"][0] != loss["values"][1]
    shown = {
        ("| **This model** | test (24) |", loss["values"][best]),
        ("| Mean over 2 seeds | test (24) |", loss["mean"]),
        ("| **This model** | validation (6) |", trained["eval_loss"]),
    }
    for row, value in shown:
        assert f" {value:.4f} |" in next(line for line in card.text.splitlines() if line.startswith(row))
    assert re.search(rf"`learning_rate` \| {results['learning_rate']:.3g}", card.text)
    assert "9 steps were taken" in card.text
    assert card.data.pipeline_tag == "image-classification"
    assert "(figures/finetuning.png)" in card.text
    assert str(images) not in str(card)


def test_an_interrupted_run_goes_on_and_finished_seeds_are_not_run_again(
    finished: tuple[Path, str], images: Path, models: Path, tmp_path: Path
) -> None:
    output, _ = finished
    cut = shutil.copytree(output, tmp_path / "out")
    for name in ("all_results.json", "model.safetensors"):
        (cut / name).unlink()
    shutil.rmtree(cut / "seed-6")
    kept = (cut / "seed-5" / "result.json").stat().st_mtime_ns
    finetune.main(settings(images, models / "simclr", cut, **SEARCHED, resume_from_checkpoint=True))
    assert (cut / "seed-5" / "result.json").stat().st_mtime_ns == kept
    for name in ("model.safetensors", "seed-6/model/model.safetensors"):
        assert (cut / name).read_bytes() == (output / name).read_bytes()
    first, second = (json.loads((folder / "all_results.json").read_text()) for folder in (output, cut))
    times = [results.pop("train_seconds") for results in (first, second)]
    assert first == second
    assert times[0][0] == times[1][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**SEARCHED, "num_train_epochs": 2},
            r"search was begun with other settings: num_train_epochs was 3.0 and is 2",
        ),
        ({"learning_rate": 0.7}, r"seed-5 was begun with other settings: learning_rate was [\d.]+ and is 0.7"),
    ],
)
def test_other_settings_than_those_of_finished_parts_are_refused_before_training(
    finished: tuple[Path, str],
    images: Path,
    models: Path,
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, _ = finished
    monkeypatch.setattr(FineTuneTrainer, "train", None)
    given = settings(images, models / "simclr", output, resume_from_checkpoint=True, **changes)
    assert re.search(message, runs.refusal(capsys, finetune.main, given))


@pytest.mark.parametrize("kind", ["simclr", "classifier", "backbone", "bilevel"])
def test_every_kind_of_checkpoint_is_taken_with_its_weights(
    kind: str, images: Path, models: Path, tmp_path: Path
) -> None:
    """At a learning rate of 0 the backbone stays what it was, and the head is a new one."""
    changes = {"learning_rate": 0.0, "weight_decay": 0.0, "num_train_epochs": 1}
    finetune.main(settings(images, models / kind, tmp_path / "out", **changes))
    found = dict(AutoModelForImageClassification.from_pretrained(tmp_path / "out").named_parameters())
    source = SimCLRForPreTraining if kind in ("simclr", "bilevel") else ResNetForImageClassification
    folder = "simclr" if source is SimCLRForPreTraining else "classifier"
    expected = source.from_pretrained(models / folder)
    for name, value in expected.base_model.named_parameters():
        assert (found[f"resnet.{name}"] == value).all()
    classifier = dict(ResNetForImageClassification.from_pretrained(models / "classifier").named_parameters())
    assert not (found["classifier.1.weight"] == classifier["classifier.1.weight"]).all()


def test_a_head_is_kept_if_asked_for(images: Path, models: Path, tmp_path: Path) -> None:
    changes = {"learning_rate": 0.0, "weight_decay": 0.0, "num_train_epochs": 1, "keep_head": True}
    finetune.main(settings(images, models / "classifier", tmp_path / "out", **changes))
    found = dict(AutoModelForImageClassification.from_pretrained(tmp_path / "out").named_parameters())
    expected = ResNetForImageClassification.from_pretrained(models / "classifier").named_parameters()
    assert all((found[name] == value).all() for name, value in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "digitz"}, "There is no data set 'digitz'"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"search_trials": -1}, "search_trials is -1; it must be at least 0"),
        ({"search_trials": 1, "search_backend": "grid"}, "search_backend is 'grid'; it must be one of optuna, ray"),
        ({"search_learning_rate": [1.0, 0.1]}, "The range of learning_rate is .*; it must be two numbers"),
        ({"batch_norm": "off"}, "batch_norm is 'off'; it must be one of running, recalibrated"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"optim": "sgdd"}, "optim is 'sgdd'"),
        ({"optim_args": "momentun=0.9"}, "SGD .* does not take momentun"),
        ({"warmup_steps": 1000}, "The warm-up for lr_scheduler_type has 1000 steps; it must fit into"),
        ({"model_init": "zeros"}, "model_init is 'zeros'; it must be pretrained or random"),
        ({"keep_head": True}, "is a 'simclr' model, which is no image classifier; leave keep_head out"),
        ({"keep_head": True, "model_init": "random"}, "keep_head is true; it needs a model with pretrained weights"),
        ({"resume_from_checkpoint": "seed-5/checkpoint-3"}, "fine-tuning goes on from what its output_dir holds"),
        ({"crop_ratio": [1.0]}, "crop_ratio is .* two numbers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(
    changes: dict[str, Any],
    message: str,
    images: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = runs.refusal(capsys, finetune.main, settings(images, models / "simclr", tmp_path / "out", **changes))
    assert re.search(message, error), error


def test_models_that_do_not_fit_are_refused(
    images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, changes, message in (
        ("four_classes", {"keep_head": True}, "has 4 classes and the data set has 3"),
        ("missing", {}, f"model is '{models / 'missing'}'; there is no such folder. It must be a folder with"),
    ):
        arguments = settings(images, models / name, tmp_path / "out", **changes)
        assert message in runs.refusal(capsys, finetune.main, arguments)
