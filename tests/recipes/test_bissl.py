"""The recipe as users start it: what it refuses, what it leaves behind, and that an interrupted run goes on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from bissl_hf import SimCLRConfig, SimCLRForPreTraining, load_image_dataset
from bissl_hf.checkpoints import STAGING_FOLDER, find_last_checkpoint
from bissl_hf.cli import align
from bissl_hf.data.augment import EvalTransform
from bissl_hf.data.decoded import DecodedImages

from ..conftest import flip_a_bit
from ..processes import start_forked
from . import runs
from .runs import (
    CLASSES,
    ROOT,
    as_arguments,
    environment,
    launch,
    only_sentence,
    resnet_config,
    write_images,
    write_splits,
)

RECIPE = ROOT / "recipes" / "bissl.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three splits: 36 training, 6 validation and 24 test images."""
    return write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with tiny models: architecture only, pretext model, classifiers that fit and that do not."""
    root = tmp_path_factory.mktemp("models")
    resnet_config().save_pretrained(root / "backbone")
    config = SimCLRConfig(backbone_config=resnet_config(), projection_dims=(6, 5))
    SimCLRForPreTraining(config).save_pretrained(root / "simclr")
    ResNetForImageClassification(resnet_config()).save_pretrained(root / "classifier")
    ResNetForImageClassification(resnet_config(num_labels=4)).save_pretrained(root / "four_classes")
    ResNetForImageClassification(resnet_config(depth=2)).save_pretrained(root / "deeper")
    return root


def settings(images: Path, models: Path, output: Path, **changes: Any) -> list[str]:
    """The arguments of a run that is small and sound, with changes; `None` leaves an argument out."""
    values: dict[str, Any] = {
        "dataset": images,
        "backbone": models / "backbone",
        "backbone_init": "random",
        "projection_dims": [6, 5],
        "image_size": 16,
        "output_dir": output,
        "num_alternations": 2,
        "lower_steps": 2,
        "upper_steps": 2,
        "per_device_lower_batch_size": 12,
        "per_device_train_batch_size": 12,
        "per_device_eval_batch_size": 12,
        "pretrain_steps": 4,
        "head_warmup_epochs": 2,
        "learning_rate": 0.05,
        "proximal_weight": 1.0,
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    return as_arguments(values)


# A plan


def test_a_plan_leaves_nothing_behind(images, models, tmp_path, capsys):
    output = tmp_path / "out"
    align.main(settings(images, models, output, plan=True, num_alternations=50))
    screen = capsys.readouterr().out
    assert not output.exists()
    assert re.search(r"lower step +\d+\.\d+ s +100 ", screen)
    assert re.search(r"upper step +\d+\.\d+ s +100 ", screen)
    assert re.search(r"head warm-up step +\d+\.\d+ s +6 ", screen)
    assert re.search(r"checkpoint +\d+\.\d+ s +50 ", screen)
    assert re.search(r"The whole run will take about .+ GiB", screen)


# What is refused


def refusal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    return runs.refusal(capsys, align.main, arguments)


# One or two of each kind, to show that they reach the command; the rest is tested where it is checked.
WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"dataset": "digitz"}, "There is no data set 'digitz'.*Did you mean 'digits'"),
    ({"image_column": "photo"}, r"no column 'photo'; its columns are \['image', 'label'\]: choose one with `image_co"),
    ({"num_alternations": 0}, "num_alternations is 0; it must be a finite number of at least 1"),
    ({"image_size": 0}, "`image_size` is 0; it must be at least 2"),
    ({"per_device_lower_batch_size": 37}, "batch of 37, and lower_dataset has 36 examples"),
    ({"pretrain_batch_size": 37}, "pretrain_batch_size is 37; it must be between 2 and 36"),
    ({"lower_optim_args": "beta=0.9"}, "LARS .* does not take beta"),
    ({"license": "mine"}, "license is 'mine'; it must be an identifier that the Hub knows"),
    ({"temperature": 0.0}, "temperature.* 0.0"),
    ({"crop_scale": [0.9, 0.1]}, r"`crop_scale` is \(0.9, 0.1\)"),
    ({"report_to": "nobody"}, "nobody"),
    ({"lower_stepz": 3}, "Unknown argument --lower_stepz; did you mean lower_steps"),
    ({"resume_from_checkpoint": "no_such_checkpoint"}, "resume_from_checkpoint is no_such_checkpoint"),
]


@pytest.mark.parametrize(
    ("changes", "message"), WRONG_VALUES, ids=[f"{next(iter(c))}={next(iter(c.values()))}" for c, _ in WRONG_VALUES]
)
def test_refuses_wrong_values(
    changes: dict[str, Any],
    message: str,
    images: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = refusal(capsys, settings(images, models, tmp_path / "out", **changes))
    assert re.search(message, error), error


YAML_FILES = {
    "lower_stepz: 3": "Unknown field 'lower_stepz' in .*; did you mean lower_steps",
    "lower_steps: [": "is not valid YAML",
    "lower_steps: many": "--lower_steps.*: invalid int value: 'many'",
}


@pytest.mark.parametrize(("content", "message"), YAML_FILES.items(), ids=[repr(text) for text in YAML_FILES])
def test_refuses_wrong_yaml(
    content: str, message: str, images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(content)
    arguments = settings(images, models, tmp_path / "out", lower_steps=None, use_cpu=None, learning_rate=None)
    error = refusal(capsys, [*arguments, "--config", str(config)])
    assert re.search(message, error), error


def test_refuses_a_configuration_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing.yaml cannot be read: No such file" in refusal(capsys, ["--config", str(tmp_path / "nothing.yaml")])
    assert "cannot be read: Is a directory" in refusal(capsys, [f"--config={tmp_path}"])
    assert "--config needs a YAML file" in refusal(capsys, ["--config"])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00x")
    assert "is not valid YAML" in refusal(capsys, ["--config", str(tmp_path / "binary.yaml")])


def parquet(path: Path, labels: list[Any], feature: Any, column: str = "label") -> Path:
    """Writes a Parquet file with one small image per label."""
    pictures = [Image.new("RGB", (16, 16), (9 * row, 50, 90)) for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), column: feature})
    rows = datasets.Dataset.from_dict({"image": pictures, column: labels}, features=features)
    # 2026-11: datasets 5.1 cannot write no rows by `to_parquet`.
    pyarrow.parquet.write_table(rows.data.table.cast(features.arrow_schema), path)
    return path


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0, 1, 2, 1] * 4, datasets.ClassLabel(names=["a", "b", "c"]), None),
        (
            [0, 1, -1, 1] * 4,
            datasets.Value("int64"),
            "label in row 2 of .* is -1; it must be 0 to 1",
        ),
        ([0, None, 2, 1] * 4, datasets.Value("int64"), "There is no label in row 1 of the split 'train'"),
        ([None] * 16, datasets.Value("int64"), "There is no label in row 0"),
        ([None] * 16, datasets.Value("string"), "There is no label in row 0"),
        ([0.5, 1.5] * 8, datasets.Value("float32"), "labels must be class labels, integers or strings"),
        ([], datasets.Value("int64"), "are empty or cannot be read"),
    ],
    ids=["outside class names", "negative", "one missing", "all missing", "no strings", "floats", "empty split"],
)
def test_refuses_wrong_labels(
    labels: list[Any],
    feature: Any,
    message: str | None,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if message is None:
        # The library checks the range when it writes, so the names are cut afterwards.
        table = parquet(tmp_path / "whole.parquet", labels, datasets.Value("int64"))
        loaded = datasets.load_dataset("parquet", data_files=str(table), split="train")
        names = datasets.ClassLabel(names=["a", "b"])
        loaded.info.features["label"] = names
        loaded._info.features["label"] = names
        loaded.to_parquet(tmp_path / "data.parquet")
        message = "label in row 2 of the split 'train' of .* is 2; it must be 0 to 1"
    else:
        parquet(tmp_path / "data.parquet", labels, feature)
    error = refusal(capsys, settings(tmp_path / "data.parquet", models, tmp_path / "out"))
    assert re.search(message, error), error


def test_refuses_columns_it_cannot_guess(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = parquet(tmp_path / "data.parquet", [0, 1] * 8, datasets.Value("int64"), column="kind")
    error = refusal(capsys, settings(data, models, tmp_path / "out"))
    assert re.search(r"No labels were found.* \['image', 'kind'\]: name one with `label_column`", error), error
    numbers = datasets.Dataset.from_dict({"pixels": [1, 2], "label": [0, 1]})
    numbers.to_parquet(tmp_path / "numbers.parquet")
    error = refusal(capsys, settings(tmp_path / "numbers.parquet", models, tmp_path / "out"))
    assert re.search(r"No column of images .* \['pixels', 'label'\]: name one with `image_column`", error), error


def test_refuses_images_that_cannot_be_read(
    images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(images, tmp_path / "images")
    broken = tmp_path / "images" / "train" / "dog" / "03.png"
    broken.write_bytes(broken.read_bytes()[:60])
    error = refusal(capsys, settings(tmp_path / "images", models, tmp_path / "out"))
    assert str(broken) in error
    assert "cannot be read" in error
    broken.write_text("no image")
    assert str(broken) in refusal(capsys, settings(tmp_path / "images", models, tmp_path / "out"))
    shutil.rmtree(tmp_path / "images" / "test")
    (tmp_path / "images" / "test").mkdir()
    assert "There are no images in" in refusal(capsys, settings(tmp_path / "images", models, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"upper_model": "deeper"}, "The two backbones are not the same; only in the upper model"),
        ({"upper_model": "four_classes"}, "has 4 classes and the data set has 3; leave upper_model out"),
        ({"upper_model": "simclr"}, "SimCLR|simclr"),
        ({"upper_model": "missing"}, "upper_model is .*missing'; there is no such folder. It must be a folder with"),
        (
            {"lower_model": "classifier", "backbone": None},
            "is a 'resnet' model; it must be one of a pretext task.*--backbone",
        ),
        ({"lower_model": "simclr"}, "Both lower_model and backbone are given"),
        ({"lower_model": "missing", "backbone": None}, "lower_model is .*missing'; there is no such folder. It must"),
        ({"backbone_init": "pretrained"}, "backbone"),
        ({"backbone": None, "upper_model": "classifier"}, "share no backbone|not the same"),
    ],
)
def test_refuses_models_that_do_not_fit(
    changes: dict[str, Any],
    message: str,
    images: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = {
        name: models / value if name != "backbone_init" and value is not None else value
        for name, value in changes.items()
    }
    error = refusal(capsys, settings(images, models, tmp_path / "out", **paths))
    assert re.search(message, error), error


def test_refuses_an_output_folder_that_it_may_not_use(
    images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot be written to" in refusal(capsys, settings(images, models, output))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    assert "holds files, maybe of an unfinished run" in refusal(capsys, settings(images, models, tmp_path / "other"))
    (tmp_path / "other" / "all_results.json").write_text("{}")
    error = refusal(capsys, settings(images, models, tmp_path / "other"))
    assert re.search("holds a finished run; pass --resume_from_checkpoint true to go on", error), error


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(RECIPE), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_refuses_in_a_process_of_its_own(images: Path, models: Path, tmp_path: Path) -> None:
    """Nothing that the libraries print comes before the sentence."""
    run = start(settings(images, models, tmp_path / "out", upper_model=models / "deeper"))
    out, err = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "The two backbones are not the same" in only_sentence(err)
    assert "Pre-training" not in out
    assert list((tmp_path / "out").iterdir()) == []


# What a run leaves behind


@pytest.fixture(scope="module")
def finished(images: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder of a run through the launcher, and what the run printed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    return output, launch("bissl.py", settings(images, models, output, head_warmup_epochs=10))


def test_a_run_leaves_its_files(finished: tuple[Path, str]) -> None:
    output, printed = finished
    names = {path.name for path in output.iterdir()}
    assert names >= {"config.json", "model.safetensors", "preprocessor_config.json", "all_results.json", "bilevel"}
    assert {path.name for path in (output / "bilevel").iterdir()} >= {"config.json", "model.safetensors"}
    assert [name for name in names if name.startswith(".")] == []
    for figure in ("training.png", "tsne.png"):
        with Image.open(output / "figures" / figure) as image:
            assert len(image.convert("RGB").resize((200, 80)).getcolors(200 * 80)) > 20
    results = json.loads((output / "all_results.json").read_text())
    assert not any("preparation_time" in name for name in results)
    page = (output / "report.html").read_text()
    assert f"{100 * results['test_accuracy']:.2f} %" in page
    assert "Most confident errors" in page or results["test_accuracy"] == 1
    assert [row["lower/loss"] > 0 for row in results["log_history"] if "lower/loss" in row] == [True, True]
    for split in ("validation", "test"):
        accuracy, loss = f"{100 * results[f'{split}_accuracy']:.2f} %", f"{results[f'{split}_loss']:.4f}"
        (row,) = re.findall(rf"{split} +after: aligned +\d+ +(.+)", printed)
        assert row.startswith(accuracy)
        assert row.endswith(loss)
        assert re.search(r" \d+\.\d to \d+\.\d ", row)
    assert max(map(len, printed.splitlines())) <= 100 + len(str(output))


def test_the_model_card_says_what_the_run_has_shown(finished: tuple[Path, str], images: Path) -> None:
    output, _ = finished
    results = json.loads((output / "all_results.json").read_text())
    card = ModelCard.load(output / "README.md")
    test = [result for result in card.data.eval_results if result.dataset_split == "test"]
    found = {result.metric_type: result.metric_value for result in test}
    assert {"accuracy", "loss"} <= set(found)
    assert found == {name: results[f"test_{name}"] for name in found}
    assert f"| **This model** | test (24) | {results['test_loss']:.4f} | {results['test_accuracy']:.4f} |" in card.text
    assert f"| test (24) | {results['before_loss']:.4f} | {results['before_accuracy']:.4f} |" in card.text
    assert re.findall(r"!\[.*\]\((.*)\)", card.text) == ["figures/tsne.png", "figures/training.png"]
    assert 'BiSSLModel.from_pretrained("path/to/this/folder", subfolder="bilevel")' in card.text
    assert str(images) not in str(card)
    assert str(output.parent) not in str(card)


ELSEWHERE = """
import json, sys
sys.modules["bissl_hf"] = None
from transformers import AutoModel, AutoModelForImageClassification, pipeline
folder, paths = sys.argv[1], sys.argv[2:]
reports = {}
for kind in (AutoModelForImageClassification, AutoModel):
    _, report = kind.from_pretrained(folder, output_loading_info=True)
    reports[kind.__name__] = {key: sorted(report[key]) for key in ("missing_keys", "unexpected_keys")}
classify = pipeline("image-classification", model=folder)
predictions = [{row["label"]: row["score"] for row in rows} for rows in classify(paths, top_k=None)]
print(json.dumps({"reports": reports, "predictions": predictions}))
"""


def test_what_a_run_leaves_works_without_the_package(finished: tuple[Path, str], images: Path, tmp_path: Path) -> None:
    """From the raw files and without this package come the accuracy, the loss and the probabilities of `evaluate`."""
    output, _ = finished
    paths = sorted((images / "test").rglob("*.png"))
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(output), *map(str, paths)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    head = ["classifier.1.bias", "classifier.1.weight"]
    assert found["reports"]["AutoModelForImageClassification"] == {"missing_keys": [], "unexpected_keys": []}
    assert found["reports"]["AutoModel"] == {"missing_keys": [], "unexpected_keys": head}

    names = [path.parent.name for path in paths]
    predictions = found["predictions"]
    results = json.loads((output / "all_results.json").read_text())
    right = [max(row, key=row.get) == name for row, name in zip(predictions, names, strict=True)]
    assert np.mean(right) == results["test_accuracy"]
    losses = [-np.log(row[name]) for row, name in zip(predictions, names, strict=True)]
    assert np.mean(losses) == pytest.approx(results["test_loss"], rel=1e-4)

    split = load_image_dataset(images)["test"]
    decoded = DecodedImages.from_dataset(split, image_size=16)
    pixels = torch.stack([decoded[row]["pixel_values"] for row in range(len(decoded))])
    model = AutoModelForImageClassification.from_pretrained(output).eval()
    with torch.no_grad():
        inputs = EvalTransform(16)({"pixel_values": pixels}, (0,))
        expected = model(**inputs).logits.softmax(-1).numpy()
    assert [model.config.id2label[number] for number in range(3)] == list(CLASSES)
    np.testing.assert_allclose([[row[name] for name in CLASSES] for row in predictions], expected, atol=1e-4)


def test_going_on_with_a_finished_run_ends_at_once(
    finished: tuple[Path, str], images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, printed = finished
    copy = shutil.copytree(output, tmp_path / "out")
    arguments = settings(images, models, copy, head_warmup_epochs=10, resume_from_checkpoint=True)
    align.main(arguments)
    again = capsys.readouterr().out
    assert "Pre-training" not in again
    assert again.partition("\n\n")[2] == printed.partition("\n\n")[2].replace(str(output), str(copy))
    assert figures(copy) == figures(output)
    assert weights(copy) == weights(output)


def test_going_on_from_another_pretraining_is_refused(
    finished: tuple[Path, str], images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished[0], tmp_path / "out")
    changes = {"head_warmup_epochs": 10, "resume_from_checkpoint": True, "pretrain_learning_rate": 0.3}
    error = refusal(capsys, settings(images, models, copy, **changes))
    assert "pretraining was begun with other settings: pretrain_learning_rate was 4.8 and is 0.3" in error
    assert weights(copy) == weights(finished[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"color_jitter": 0.0}, "color_jitter was 0.8 and is 0.0"),
        ({"image_size": 18}, "preprocessing was 16 x 16 pixels"),
        ({"lower_dataset": "others"}, "checksum of the lower images was"),
        ({"dataset": "others"}, "checksum of the train images was"),
    ],
    ids=["views", "size", "unlabelled images", "labelled images"],
)
def test_going_on_with_a_pretraining_on_other_images_is_refused(
    changes: dict[str, Any],
    message: str,
    finished: tuple[Path, str],
    images: Path,
    models: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also where it was interrupted between pre-training and the first checkpoint."""
    copy, others = shutil.copytree(finished[0], tmp_path / "out"), write_splits(tmp_path / "others")
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    write_images(others / "train" / "more", 1, seed=9)
    for path in sorted((others / "train" / "more").rglob("*.png")):
        path.replace(others / "train" / path.parent.name / "00.png")  # as many as before, and one of each is another
    shutil.rmtree(others / "train" / "more")
    changes = {name: others if value == "others" else value for name, value in changes.items()}
    arguments = {"head_warmup_epochs": 10, "resume_from_checkpoint": True, **changes}
    assert message in refusal(capsys, settings(images, models, copy, **arguments))


def test_damaged_figures_from_before_are_made_anew(
    finished: tuple[Path, str], images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished[0], tmp_path / "out")
    flip_a_bit(copy / "before.json", 0.4)
    align.main(settings(images, models, copy, head_warmup_epochs=10, resume_from_checkpoint=True))
    assert f"Passing over {copy}/before.json, which is empty or damaged: it is made anew" in capsys.readouterr().err
    assert figures(copy) == figures(finished[0])
    assert (copy / "before.json").read_bytes() != b""


def figures(output: Path) -> list[Any]:
    """Every figure in the summary but the time of the last steps, which is another each time."""
    results = json.loads((output / "all_results.json").read_text())
    history = [row for row in results.pop("log_history") if "lower/loss" in row or "eval_loss" in row]
    assert len(history) == 4
    tables = [{name: value for name, value in results.items() if "time" not in name and "_per_" not in name}]
    tables += [{k: v for k, v in row.items() if "time" not in k and "_per_" not in k} for row in history]
    assert all(len(table) > 3 for table in tables)
    return tables


def weights(output: Path) -> list[bytes]:
    return [(output / name).read_bytes() for name in ("model.safetensors", "bilevel/model.safetensors")]


# Interruptions


LONGER = {"pretrain_steps": 30, "head_warmup_epochs": 60, "lower_steps": 10, "upper_steps": 10, "num_alternations": 4}
NUM_STEPS = 80


def holds(folder: str, pattern: str) -> Callable[[Path], bool]:
    return lambda output: any((output / folder).glob(pattern))


# When to kill: what the output folder must hold, and for how long to wait after that, in seconds, at most.
MOMENTS: dict[str, tuple[Callable[[Path], bool], float]] = {
    "pre-training": (holds("pretraining", "checkpoint-*"), 0.3),
    "a checkpoint of pre-training": (holds("pretraining", STAGING_FOLDER), 0.0),
    "head warm-up": (holds("pretraining", "model"), 0.3),
    "first alternation": (holds("", "before.json"), 0.4),
    "a checkpoint": (holds("", STAGING_FOLDER), 0.0),
    "second alternation": (holds("", "checkpoint-20"), 0.4),
    "third alternation": (holds("", "checkpoint-40"), 0.4),
    "last files": (holds("", f"checkpoint-{NUM_STEPS}"), 0.1),
}


def kill_at(moment: str, arguments: list[str], output: Path, random: np.random.Generator) -> None:
    """Starts the command and kills it, with its workers, at a moment."""
    reached, delay = MOMENTS[moment]
    # What an earlier start left half-written is no sign of this one.
    for folder in (output / "pretraining" / STAGING_FOLDER, output / STAGING_FOLDER):
        if folder.exists():
            folder.rename(folder.with_name(f".left-{random.integers(10**9)}"))
    run = start_forked(align.main, arguments)
    deadline = time.monotonic() + 120
    while not reached(output) and run.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay * random.random())
    assert run.is_alive(), f"the run ended with {run.exitcode} before the moment {moment!r}"
    os.killpg(run.pid, signal.SIGKILL)
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert reached(output), f"the moment {moment!r} did not come"


@pytest.fixture(scope="module")
def uninterrupted(images: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """The weights that a run of the recipe leaves which nothing disturbs."""
    output = tmp_path_factory.mktemp("uninterrupted") / "out"
    run = start(settings(images, models, output, **LONGER))
    _, errors = run.communicate(timeout=240)
    assert run.returncode == 0, errors
    return weights(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moments", "workers"),
    [(tuple(MOMENTS), 0), (("pre-training", "first alternation", "third alternation"), 2)],
    ids=["no workers", "two workers"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    moments: tuple[str, ...], workers: int, uninterrupted: list[bytes], images: Path, models: Path, tmp_path: Path
) -> None:
    output, random = tmp_path / "out", np.random.default_rng(workers)
    arguments = settings(images, models, output, dataloader_num_workers=workers, **LONGER)
    resume = ["--resume_from_checkpoint", "true"]
    for number, moment in enumerate(moments):
        kill_at(moment, arguments + (resume if number else []), output, random)

    newest, _ = find_last_checkpoint(output)
    assert newest is not None
    cut = newest / "optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:-1])
    last = start_forked(align.main, arguments + resume, errors=tmp_path / "errors")
    last.join(240)
    errors = (tmp_path / "errors").read_text()
    assert last.exitcode == 0, errors
    assert f"Passing over {newest}, which is not whole: optimizer.pt has" in errors
    assert weights(output) == uninterrupted
