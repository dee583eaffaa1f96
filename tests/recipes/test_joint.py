"""Joint training and prediction as users start them."""

import csv
import json
from pathlib import Path

import pytest
from transformers import pipeline

from bissl_hf.cli import joint, predict

from . import runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("joint")
    runs.resnet_config().save_pretrained(root / "backbone")
    values = {
        "dataset": images, "backbone": root / "backbone", "backbone_init": "random", "projection_dims": [6, 5],
        "image_size": 16, "output_dir": root / "out", "max_steps": 3, "per_device_train_batch_size": 12,
        "per_device_labelled_batch_size": 12, "per_device_eval_batch_size": 12, "learning_rate": 0.1,
        "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    joint.main(runs.as_arguments(values))
    return root / "out"


def test_predictions_are_those_of_the_pipeline_and_unreadable_files_are_listed(
    finished: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((finished / "all_results.json").read_text())
    assert {"test_accuracy", "eval_accuracy", "test_macro_f1"} <= set(results)
    assert set(results["test_per_class"]) == set(runs.CLASSES)
    (tmp_path / "broken.png").write_text("no image")
    output = tmp_path / "predictions.csv"
    inputs = [str(images / "test"), str(tmp_path)]
    predict.main(["--model", str(finished), "--inputs", *inputs, "--output", str(output), "--use_cpu", "true"])
    assert "1 could not be read" in capsys.readouterr().err
    rows = list(csv.DictReader(output.read_text().splitlines()))
    classify = pipeline("image-classification", model=str(finished), device="cpu")
    assert len(rows) == 24
    right = [row["label"] == Path(row["file"]).parent.name for row in rows]
    assert sum(right) / 24 == pytest.approx(results["test_accuracy"], abs=1e-6)
    for row in rows[:6]:
        expected = classify(row["file"], top_k=3)
        assert [row["label"], row["label_2"], row["label_3"]] == [found["label"] for found in expected]
        assert float(row["score_2"]) == pytest.approx(expected[1]["score"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [(["--inputs", "nowhere"], "inputs names 'nowhere'"), (["--top_k", "0"], "top_k is 0; it must be at least 1")],
)
def test_predict_refuses(changes: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["--model", str(tmp_path), "--inputs", str(tmp_path), *changes]
    assert message in runs.refusal(capsys, predict.main, given)


def test_without_a_data_set_it_says_what_it_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert "This command trains both tasks on one backbone for 600 epochs" in runs.refusal(capsys, joint.main, [])
