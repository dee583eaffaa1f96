"""What an alignment leaves, without the training before it."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bissl_hf.cards.facts import ModelFacts
from bissl_hf.cli import aligned
from bissl_hf.cli.align import print_pull
from bissl_hf.cli.aligned import AFTER, BEFORE, UPPER, AlignedRun
from bissl_hf.cli.levels import Images
from bissl_hf.data.augment import TrainTransform, TwoViewTransform
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.evaluation.metrics import SINGLE_LABEL
from bissl_hf.tasks.downstream import DownstreamTask

from ..report.made import made_run

NAMES = ["cat", "dog"]
TASK = DownstreamTask(SINGLE_LABEL, NAMES, 8, TrainTransform(8))


def split(rows: int) -> DecodedImages:
    pixels = np.random.default_rng(rows).integers(0, 256, (rows, 3, 8, 8)).astype(np.uint8)
    return DecodedImages(pixels, np.arange(rows) % 2, NAMES)


IMAGES = Images(split(20), split(10), split(40), NAMES, lower=split(30))


def stage(prefixes: tuple[str, str], right: float) -> dict[str, Any]:
    """A model that takes the first images of each split, up to a fraction, for what they are."""
    found: dict[str, Any] = {"metrics": {}, "predictions": {}, "per_class": {"cat": right, "dog": right}}
    for prefix, name in zip(prefixes, ("test", "validation"), strict=True):
        labels = np.asarray(getattr(IMAGES, name).labels)
        wrong = np.arange(len(labels)) >= right * len(labels)
        found["metrics"] |= {
            f"{prefix}_accuracy": float((~wrong).mean()), f"{prefix}_loss": 1 - right, f"{prefix}_runtime": 1.0,
            f"{prefix}_upper_accuracy": 0.5, f"{prefix}_upper_loss": 0.7,
        }  # fmt: skip
        found["predictions"][name] = {
            "predicted": np.where(wrong, 1 - labels, labels).tolist(),
            "confidence": [0.9] * len(labels),
        }
    return {**found, "layout": [[0.0, 1.0]] * 4, "labels": [0, 1, 0, 1], "seconds": {"Pre-training": 3.0}}


class Trainer:
    """Stands in for a [`BiSSLTrainer`] after its training."""

    def __init__(self, folder: Path, pull: float = 5.0) -> None:
        self.args = SimpleNamespace(output_dir=str(folder), seed=3)
        run = made_run()
        self.state = SimpleNamespace(log_history=[{**row, "levels/pull": pull} for row in run.log_history])
        self.facts = ModelFacts(dataset="digits", lower_dataset="digits")
        self.step_clock = SimpleNamespace(seconds={"lower": 1.0, "upper": 2.0, "between": 0.5})
        self.streams = SimpleNamespace(transform=lambda stream: TwoViewTransform(8))
        self.record = lambda: run
        self.exported_level = lambda: "aligned"
        self.saved: list[str] = []
        self.save_model = self.saved.append
        self.create_model_card = lambda: self.saved.append("card")


def made(folder: Path, *, before: float = 0.5, after: float = 0.9, pull: float = 5.0) -> AlignedRun:
    stages = (stage(("before", "before_validation"), before), stage(("test", "validation"), after))
    trainer: Any = Trainer(folder, pull)
    return AlignedRun(trainer, TASK, IMAGES, *stages)


def test_each_model_is_told_of_on_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path)
    found = run.outcomes()
    accuracies = {model: [each.metrics["accuracy"] for each in pair] for model, pair in found.items()}
    assert accuracies == {BEFORE: [0.5, 0.5], AFTER: [0.9, 0.9], UPPER: [0.5, 0.5]}
    assert [(each.split, each.examples) for each in found[AFTER]] == [("validation", 10), ("test", 40)]
    run.print_summary()
    printed = capsys.readouterr().out
    for row in ("validation  before: linear head  10  50.00 %", "test        after: aligned       40  90.00 %"):
        assert row in printed
    assert "76.9 to 96.0" in printed  # of 36 right of 40
    assert max(map(len, printed.replace(str(tmp_path), "outputs/digits").splitlines())) <= 100


def test_what_a_difference_means_is_said(tmp_path: Path) -> None:
    clear = " ".join(made(tmp_path).conclusions())
    assert "+40.00 points" in clear
    assert "16 gained, 0 lost" in clear
    assert "holds 0" not in clear
    assert "holds 0" in " ".join(made(tmp_path, after=0.5).conclusions())
    assert "no difference is due to BiSSL" in " ".join(made(tmp_path, pull=0.1).conclusions())
    assert "little part in it" in " ".join(made(tmp_path, pull=1.0).conclusions())


def test_a_run_leaves_results_figures_a_card_and_a_report(tmp_path: Path) -> None:
    run = made(tmp_path)
    run.write_outputs()
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["before_accuracy"] == results["before_validation_accuracy"] == 0.5
    assert results["test_accuracy"] == results["validation_accuracy"] == 0.9
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"training.png", "tsne.png"}
    assert run.trainer.saved == [str(tmp_path), "card"]  # type: ignore[attr-defined]
    page = (tmp_path / "report.html").read_text()
    for text in ("90.00 %", "after: upper level", "Views of the pretext task", "taken for dog", "Pre-training"):
        assert text in page


@pytest.mark.parametrize(
    ("level", "described", "beside", "printed"),
    [
        ("aligned", 0.9, "The upper level's model", "The aligned model is in"),
        ("upper", 0.5, "The aligned model", "The model of the upper level is in"),
    ],
)
def test_the_card_and_the_summary_are_of_the_model_that_is_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], level: str, described: float, beside: str, printed: str
) -> None:
    run: Any = made(tmp_path)
    run.trainer.exported_level = lambda: level
    run.write_outputs()
    (own,) = [evaluation for evaluation in run.trainer.facts.evaluations if evaluation.described]
    assert (own.model, own.metrics["accuracy"]) == ("This model", described)
    assert beside in [evaluation.model for evaluation in run.trainer.facts.evaluations]
    run.print_summary()
    assert printed in capsys.readouterr().out


def test_a_report_that_fails_is_a_warning_and_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aligned, "write_report", lambda *_: math.sqrt(-1))
    made(tmp_path).write_outputs()
    assert "warning: The report failed" in capsys.readouterr().err
    assert (tmp_path / "all_results.json").is_file()


def test_a_pull_is_printed_where_the_trainer_does_not_warn_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for pull, is_told in ((5.0, True), (1.0, False), (math.nan, False)):
        trainer: Any = SimpleNamespace(
            estimate_pull=lambda pull=pull: pull, is_world_process_zero=lambda: True, proximal_weight=0.123
        )
        print_pull(trainer)
        printed = capsys.readouterr().out
        assert ("one: 5 over the run" in printed) is is_told
        assert max(map(len, ["", *printed.splitlines()])) <= 100
