"""Search over learning rate and weight decay: which pairs are tried, that none is tried twice, and which is chosen."""

import importlib.util
import math
import sqlite3
from contextlib import closing

import numpy as np
import optuna
import pytest
import torch
from transformers import ResNetForImageClassification, TrainerCallback

from bissl_hf.checkpoints import DamagedFileError
from bissl_hf.evaluation.metrics import classification_metrics
from bissl_hf.trainer.divergence import DivergenceError
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer
from bissl_hf.trainer.search import SearchSpace, _figures, _last_row, check_backend, search
from bissl_hf.trainer.training_args import FineTuningArguments

from ..conftest import TinyImages, tiny_resnet_config

SPACE = SearchSpace(learning_rate=(1e-3, 0.5), weight_decay=(1e-5, 1e-2))


class Tried(TrainerCallback):
    """Notes the pairs that are trained, and may fail in one of them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.pairs: list[tuple[float, float]] = []
        self.fail_at = fail_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.pairs.append((args.learning_rate, args.weight_decay))
        if len(self.pairs) == self.fail_at:
            raise KeyboardInterrupt


def build_model() -> ResNetForImageClassification:
    return ResNetForImageClassification(tiny_resnet_config())


def make_trainer(folder, callback: TrainerCallback | None = None, **overrides) -> FineTuneTrainer:
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "seed": 7, "eval_strategy": "no"}
    args = FineTuningArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, save_strategy="no", **{**settings, **overrides}
    )
    return FineTuneTrainer(
        model_init=build_model,
        args=args,
        train_dataset=TinyImages(20),
        eval_dataset=TinyImages(9),
        compute_metrics=classification_metrics(num_labels=3),
        callbacks=[callback] if callback else None,
    )


def pairs(trials) -> list[tuple[float, float]]:
    return [(trial["learning_rate"], trial["weight_decay"]) for trial in trials]


def run(folder, num_trials: int, callback: TrainerCallback | None = None, backend: str = "optuna"):
    trainer = make_trainer(folder, callback)
    return search(trainer, SPACE, num_trials=num_trials, folder=folder, metric="accuracy", backend=backend)


def test_pairs_are_log_uniform_and_a_function_of_the_seed():
    assert SearchSpace.usual("sgd") == SearchSpace.usual("lars") == SearchSpace()
    assert SearchSpace.usual("adamw_torch_fused") == SearchSpace((1e-6, 1e-3), (1e-3, 0.3))
    drawn = SearchSpace().draw(2000, seed=1)
    assert drawn[:3] == SearchSpace().draw(3, seed=1)
    assert drawn[0] != SearchSpace().draw(1, seed=2)[0]
    for name, low, high in (("learning_rate", -4, 0), ("weight_decay", -5, -2)):
        exponents = np.log10([pair[name] for pair in drawn])
        assert exponents.min() >= low
        assert exponents.max() <= high
        quarters, _ = np.histogram(exponents, bins=4, range=(low, high))
        assert np.all(abs(quarters - 500) < 100)  # five deviations


def test_each_pair_is_trained_once_and_the_best_one_chosen(tmp_path):
    """The oracle trains each pair in a trainer of its own."""
    tried = Tried()
    result = run(tmp_path, 3, tried)
    assert tried.pairs == pairs(result.trials) == pairs(SPACE.draw(3, seed=7))
    for trial in result.trials:
        alone = make_trainer(tmp_path, learning_rate=trial["learning_rate"], weight_decay=trial["weight_decay"])
        alone.train()
        metrics = alone.evaluate()
        assert metrics["eval_loss"] == pytest.approx(trial["eval_loss"], rel=1e-6)
        assert metrics["eval_accuracy"] == trial["eval_accuracy"]
    best = max(result.trials, key=lambda trial: (trial["eval_accuracy"], -trial["eval_loss"]))
    assert result.best == {name: best[name] for name in ("learning_rate", "weight_decay")}
    assert (tmp_path / "search.db").is_file()


@pytest.mark.slow
def test_an_interrupted_search_runs_the_missing_trials_only(tmp_path):
    first, second, third = Tried(fail_at=3), Tried(), Tried()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", 6, first)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'cut' / 'search.db'}")
    killed = study.ask()  # what a process that is killed leaves behind
    assert killed.number == 3
    result = run(tmp_path / "cut", 4, second)
    assert second.pairs == pairs(SPACE.draw(4, seed=7))[2:]
    assert result == run(tmp_path / "whole", 4)
    longer = run(tmp_path / "cut", 5, third)
    assert third.pairs == pairs(SPACE.draw(5, seed=7))[4:]
    assert longer.trials[:4] == result.trials


def test_a_diverged_model_is_the_worst():
    metrics = {"eval_loss": math.nan, "eval_accuracy": 0.3, "eval_map": math.nan, "eval_runtime": 2.0, "epoch": 1}
    assert _figures(metrics) == {"eval_loss": math.inf, "eval_accuracy": 0.0, "eval_map": 0.0}


def test_a_search_in_which_every_trial_diverges_has_no_best(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=1e38, optim="sgd", warmup_steps=0)
    space = SearchSpace(learning_rate=(1e37, 1e38), weight_decay=(1e2, 1e3))
    with pytest.raises(DivergenceError, match="All 2 trials of the search diverged; search lower learning rates"):
        search(trainer, space, num_trials=2, folder=tmp_path, metric="accuracy")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("damage", [lambda content: content[:5000], lambda content: b"SQLite" + content[6:20]])
def test_a_damaged_database_is_named(tmp_path, damage):
    run(tmp_path, 1)
    database = tmp_path / "search.db"
    database.write_bytes(damage(database.read_bytes()))
    with pytest.raises(DamagedFileError, match=r"search.db is damaged \(.*\). Move it away"):
        run(tmp_path, 1)
    database.unlink()
    assert len(run(tmp_path, 1).trials) == 1


def test_a_trial_whose_figures_were_changed_is_tried_again(tmp_path):
    first = run(tmp_path, 2)
    with closing(sqlite3.connect(tmp_path / "search.db")) as connection:
        query = "UPDATE trial_user_attributes SET value_json = ? WHERE key = 'figures' AND trial_id = 1"
        connection.execute(query, ('{"eval_accuracy": 1.0, "eval_loss": 0.0}',))
        connection.commit()
    again = Tried()
    assert run(tmp_path, 2, again) == first
    assert again.pairs == pairs(first.trials)[:1]


def test_damaged_results_of_ray_are_named(tmp_path):
    (tmp_path / "result.json").write_text('{"objective": 0.5}\n{"obj')
    with pytest.raises(DamagedFileError, match=r"result.json is damaged \(.*\). Move it away"):
        _last_row(tmp_path / "result.json")


@pytest.mark.parametrize("values", [(0.1,), (0.2, 0.1), (0.0, 1.0), (0.1, math.inf)])
def test_ranges_that_are_none_are_refused(values):
    with pytest.raises(ValueError, match=r"The range of weight_decay is .*; it must be two numbers above 0"):
        SearchSpace(weight_decay=values)


def test_backends_and_counts_are_checked(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="backend is 'grid'; it must be one of optuna, ray"):
        run(tmp_path, 1, backend="grid")
    with pytest.raises(ValueError, match="num_trials is 0; it must be at least 1"):
        run(tmp_path, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"search_backend is 'ray', which is not installed: run .*'.\[search\]'"):
        check_backend("ray", field="search_backend")


@pytest.mark.slow
def test_ray_tries_the_same_pairs_and_finds_the_same(tmp_path):
    whole = run(tmp_path / "optuna", 3)
    first = run(tmp_path / "ray", 2, backend="ray")
    assert [trial["eval_accuracy"] for trial in first.trials] == [row["eval_accuracy"] for row in whole.trials[:2]]
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "ray").rglob("result.json")}
    assert len(files) == 2
    second = run(tmp_path / "ray", 3, backend="ray")
    assert second.best == whole.best
    torch.testing.assert_close(
        torch.tensor([trial["eval_loss"] for trial in second.trials]),
        torch.tensor([trial["eval_loss"] for trial in whole.trials]),
    )
    assert all(path.stat().st_mtime_ns == time for path, time in files.items()), "finished trials are not run again"
    assert len(list((tmp_path / "ray").rglob("result.json"))) == 3
    assert not list((tmp_path / "ray").rglob("*.safetensors")), "trials keep no weights"
