"""Studies as users start them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bissl_hf.cli import study

from . import runs


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_splits(tmp_path_factory.mktemp("images"))


def config(folder: Path, images: Path, **changes: Any) -> list[str]:
    """Writes the quick study on tiny images and budgets; returns the command line."""
    content = yaml.safe_load((runs.ROOT / "recipes" / "configs" / "study_quick.yaml").read_text())
    content |= {"pretext_dataset": str(images), "datasets": [str(images)], "train_examples": [12], "image_size": 8}
    content |= {"pretrain_steps": 3, "search_trials": 1, "backbone": {"model_type": "resnet", "embedding_size": 4}}
    content["backbone"] |= {"hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic"}
    content["pretrain"]["per_device_train_batch_size"] = content["bissl"]["per_device_lower_batch_size"] = 12
    content["bissl"] |= {"num_alternations": 2, "lower_steps": 1, "upper_steps": 1, "per_device_train_batch_size": 6}
    content["finetune"] |= {"num_train_epochs": 1, "per_device_train_batch_size": 6}
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**content, **changes}))
    return ["--config", str(file), "--output_dir", str(folder / "out")]


@pytest.mark.slow
def test_a_study_through_the_launcher_and_its_report_anew(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = config(tmp_path, images)
    printed = runs.launch("study.py", arguments)
    assert "part 1 of 10: pre-training, seed 0" in printed
    output = tmp_path / "out"
    results = json.loads((output / "results.json").read_text())
    assert len(results["runs"]) == 6
    assert results["settings"]["train_examples"] == [12]
    table = (output / "table.md").read_text()
    for file in ("table.md", "figures/study.png"):
        (output / file).unlink()
    study.main([*arguments, "--report_only", "true"])
    assert (output / "table.md").read_text() == table
    assert (output / "figures" / "study.png").is_file()
    assert "identity" in capsys.readouterr().out


RUN = {"dataset": "d", "train_examples": 2, "arm": "a", "seed": 0, "metric": "accuracy", "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "results.json is empty or damaged"),
        ('{"runs": [', "results.json is empty or damaged"),
        ("[]", "results.json is empty or damaged"),
        ("{}", "results.json does not hold the results of a study"),
        (json.dumps({"runs": [], "baseline": "a"}), "results.json does not hold the results of a study"),
        (
            json.dumps({"runs": [RUN], "baseline": "b"}),
            "does not hold the results of a study with runs of its baseline",
        ),
        (json.dumps({"runs": [3], "baseline": "b"}), "results.json does not hold the results of a study"),
    ],
    ids=["empty", "cut", "list", "fields", "runs", "baseline", "run"],
)
def test_results_that_are_none_are_named(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    found = runs.refusal(capsys, study.main, ["--report_only", "true", "--output_dir", str(tmp_path)])
    assert message in found
    assert (tmp_path / "results.json").read_text() == content
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 3}, "Unknown field 'seed'"),
        ({"datasets": ["digitz"]}, "There is no data set 'digitz'"),
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        (
            {"arms": [{"name": "a", "kind": "b"}]},
            "The kind of the arm a is 'b'; it must be one of conventional, bissl",
        ),
        ({"bissl": {"lambda": 1}}, "bissl sets 'lambda'"),
        ({"pretrain": {"per_device_train_batch_size": 64}}, "per_device_train_batch_size makes a batch of 64"),
        ({"report_only": True}, "has no results.json; run the study first"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(
    changes: dict[str, Any], message: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in runs.refusal(capsys, study.main, config(tmp_path, images, **changes))
