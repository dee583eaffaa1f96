"""Which of the two downstream models is saved, and that it is the one that was asked for."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from bissl_hf.trainer.export_level import better_level

from .trainers import make_args, make_trainer

LOGS = [
    {"step": 5, "eval_accuracy": 0.4, "eval_upper_accuracy": 0.6, "eval_loss": 1.0, "eval_upper_loss": 2.0},
    {"step": 5, "loss": 3.0},
    {"step": 10, "eval_accuracy": 0.7, "eval_upper_accuracy": 0.6, "eval_loss": 1.5, "eval_upper_loss": 1.0},
]


@pytest.mark.parametrize(
    ("metric", "settings", "expected"),
    [
        (None, {}, "aligned"),
        (None, {"step": 5}, "upper"),
        ("loss", {}, "upper"),
        ("eval_loss", {"step": 5}, "aligned"),
        ("accuracy", {"greater_is_better": False}, "upper"),
        (None, {"step": 7}, "aligned"),
    ],
)
def test_the_level_that_did_better(metric, settings, expected):
    assert better_level(LOGS, metric, **settings) == expected


def test_without_an_evaluation_or_with_equal_figures_it_is_the_aligned_model():
    assert better_level([]) == "aligned"
    assert better_level([{"eval_accuracy": 0.5, "eval_upper_accuracy": 0.5}]) == "aligned"
    assert better_level([{"eval_loss": 0.5, "eval_upper_loss": 0.4}]) == "upper", "the loss where there is no accuracy"


def test_a_metric_that_was_not_measured_is_refused():
    with pytest.raises(ValueError, match=r"metric_for_best_model is 'f1'.*it has accuracy, loss\."):
        better_level(LOGS, "f1")


def test_the_model_saved_is_that_of_the_level(tmp_path):
    trainer = make_trainer(tmp_path / "run", eval_rows=8, num_alternations=1)
    trainer.train()
    images = torch.stack([trainer.eval_dataset[row]["pixel_values"] for row in range(4)])
    expected = {"aligned": trainer.aligned_model(), "upper": trainer.model.upper.eval()}
    for level, model in expected.items():
        trainer.args.export_level = level
        trainer.save_model(tmp_path / level)
        saved = AutoModelForImageClassification.from_pretrained(tmp_path / level).eval()
        with torch.no_grad():
            torch.testing.assert_close(saved(images).logits, model(pixel_values=images).logits)
    trainer.args.export_level = "best"
    last = [log for log in trainer.state.log_history if "eval_upper_loss" in log][-1]
    better = "upper" if last["eval_upper_loss"] < last["eval_loss"] else "aligned"
    assert trainer.exported_level() == better
    last["eval_upper_loss"], last["eval_loss"] = last["eval_loss"], last["eval_upper_loss"]
    assert trainer.exported_level() != better
    assert trainer.record().exported_level == trainer.exported_level()


def test_the_better_level_needs_an_evaluation(tmp_path):
    with pytest.raises(ValueError, match="export_level is 'best', and there is no eval_dataset"):
        make_trainer(tmp_path, export_level="best")
    with pytest.raises(ValueError, match="export_level is 'lower'; it must be one of aligned, upper, best"):
        make_args(tmp_path, export_level="lower")
