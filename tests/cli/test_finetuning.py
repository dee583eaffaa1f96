"""The stage of fine-tuning, without the recipe around it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ResNetForImageClassification

from bissl_hf.cli.finetuning import FineTuning, summarise, without_times
from bissl_hf.data.augment import EvalTransform, TrainTransform
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.models.classifier import new_classifier
from bissl_hf.tasks.labelled import LabelledImages
from bissl_hf.trainer.search import SearchSpace
from bissl_hf.trainer.training_args import FineTuningArguments

from ..conftest import tiny_resnet_config

CONFIG = tiny_resnet_config()
CONFIG.num_channels = 3


def split(rows: int, seed: int) -> DecodedImages:
    """Images whose brightness tells the class."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, rows)
    pixels = generator.integers(0, 90, (rows, 3, 9, 9)) + 80 * labels[:, None, None, None]
    return DecodedImages(pixels.astype(np.uint8), labels.astype(np.int64), ["a", "b", "c"])


IMAGES = LabelledImages(split(30, 0), split(12, 1), split(16, 2), ["a", "b", "c"])


def tuning(folder: Path, **overrides) -> FineTuning:
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 10, "learning_rate": 0.05, "seed": 3}
    args = FineTuningArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **{**settings, **overrides})
    return FineTuning(
        args, IMAGES, lambda: new_classifier(CONFIG, ["a", "b", "c"]), TrainTransform(8), 8, {"dataset": "made up"}
    )


def test_a_run_keeps_its_model_and_is_not_run_again(tmp_path, monkeypatch):
    run = tuning(tmp_path)
    result = run.train(tmp_path / "seed-3")
    assert {"eval_accuracy", "eval_loss", "train_loss", "train_seconds", "log_history"} <= set(result)
    assert sorted(path.name for path in (tmp_path / "seed-3").iterdir()) == ["model", "result.json", "settings.json"]
    with monkeypatch.context() as patch:
        patch.setattr(FineTuning, "build_trainer", None)
        assert tuning(tmp_path).train(tmp_path / "seed-3") == result
    with pytest.raises(ValueError, match=r"begun with other settings: learning_rate was 0.05 and is 0.1"):
        tuning(tmp_path).train(tmp_path / "seed-3", learning_rate=0.1)


def test_the_test_split_is_measured_on_the_model_that_was_kept(tmp_path):
    run = tuning(tmp_path)
    run.train(tmp_path / "seed-4", seed=4)
    model = ResNetForImageClassification.from_pretrained(tmp_path / "seed-4" / "model").eval()
    rows = IMAGES.test.__getitems__(range(16))
    pixels = EvalTransform(8)({"pixel_values": torch.stack([row["pixel_values"] for row in rows])}, (0,))
    with torch.no_grad():
        logits = model(**pixels).logits
    labels = torch.tensor([row["labels"] for row in rows])
    found = run.test(tmp_path / "seed-4")
    assert found["test_accuracy"] == float((logits.argmax(-1) == labels).float().mean())
    assert found["test_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5)
    assert not any("time" in name or "second" in name for name in found)


def test_a_search_belongs_to_its_settings(tmp_path):
    space = SearchSpace(learning_rate=(1e-3, 0.1))
    found = tuning(tmp_path, num_train_epochs=1).search(tmp_path / "search", space, num_trials=1)
    assert found.best == space.draw(1, seed=3)[0]
    with pytest.raises(ValueError, match="num_train_epochs was 1 and is 2"):
        tuning(tmp_path, num_train_epochs=2).search(tmp_path / "search", space, num_trials=1)
    with pytest.raises(ValueError, match="learning_rate was"):
        tuning(tmp_path, num_train_epochs=1).search(tmp_path / "search", SearchSpace(), num_trials=1)


def test_results_are_ranked_by_the_metric_then_the_loss(tmp_path):
    run = tuning(tmp_path)
    rows = [{"eval_accuracy": a, "eval_loss": b} for a, b in ((0.5, 0.1), (0.6, 0.9), (0.6, 0.8))]
    assert max(rows, key=run.rank) == rows[2]


def test_summaries():
    assert summarise([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}
    assert summarise([2.0])["std"] is None
    evaluation = {"test_loss": 1.0, "test_map": 0.5, "test_runtime": 3.0, "test_samples_per_second": 2.0, "epoch": 1}
    assert without_times(evaluation, "test") == {"test_loss": 1.0, "test_map": 0.5}
