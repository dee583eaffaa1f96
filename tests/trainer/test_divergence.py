"""Divergence: where it is found, what is told, what is kept, and what is left out."""

import math

import pytest
import torch
from safetensors.torch import load_file

from bissl_hf.data.alternation import Stream
from bissl_hf.models.finite import not_finite_weights, with_finite_weights
from bissl_hf.models.saving import save_model
from bissl_hf.trainer.divergence import DivergenceError, check_first_batch, check_metrics

from ..conftest import tiny_model
from ..processes import run_in_processes
from .test_joint_trainer import make_trainer as make_joint_trainer
from .test_pretext_trainer import make_trainer
from .trainers import make_trainer as make_bissl_trainer


class Spoiled:
    """A transform that makes the pixels of one step NaN, on one process if asked for."""

    def __init__(self, at: tuple[int, int], rank: int | None = None, stream: int | None = None) -> None:
        self.at, self.rank, self.stream = at, rank, stream

    def __call__(self, inputs, key):
        _, stream, alternation, step, rank = key
        if (alternation, step) != self.at or self.rank not in (None, rank) or self.stream not in (None, stream):
            return inputs
        return {**inputs, "pixel_values": inputs["pixel_values"] * math.nan}


def test_a_run_that_diverges_stops_with_its_last_finite_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, num_train_epochs=4, save_strategy="epoch", save_total_limit=1)
    step, spoil = trainer.training_step, lambda: trainer.state.global_step == 5
    trainer.training_step = lambda *args: step(*args) * (math.nan if spoil() else 1.0)
    original = trainer.divergence.note_loss
    trainer.divergence.note_loss = lambda loss: original(loss * math.nan if spoil() else loss)
    with pytest.raises(DivergenceError, match=r"step 6 of epoch 3: the loss is not finite.*checkpoint-4\."):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    weights = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert all(bool(value.isfinite().all()) for value in weights.values())


def test_weights_that_overflow_are_named(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, learning_rate=1e38, optim="sgd", warmup_steps=0, weight_decay=1e3)
    with pytest.raises(DivergenceError, match=r"the weights \(.*\) are not finite"):
        trainer.train()


def test_data_are_named_as_the_cause(tmp_path):
    trainer = make_trainer(tmp_path, transform=Spoiled((1, 0)))
    with pytest.raises(DivergenceError, match=r"step 3 of epoch 2: the input \(pixel_values of the batch\)"):
        trainer.train()


def test_a_step_left_out_leaves_nothing_behind(tmp_path):
    trainer = make_trainer(tmp_path, transform=Spoiled((0, 1)), on_divergence="skip")
    trainer.train()
    assert trainer.divergence.skipped == 1
    assert not_finite_weights(trainer.model) == []
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_bissl_leaves_out_a_step_of_either_level(tmp_path, level):
    transform = Spoiled((1, 1), stream=int(Stream.LOWER if level == "lower" else Stream.UPPER))
    name = "lower_transform" if level == "lower" else "train_transform"
    trainer = make_bissl_trainer(
        tmp_path, num_alternations=3, lower_steps=2, upper_steps=2, on_divergence="skip", keywords={name: transform}
    )
    trainer.train()
    assert trainer.divergence.skipped == 1
    assert trainer.state.global_step == 12
    assert not_finite_weights(trainer.model) == []
    figures = [row[f"{level}/loss"] for row in trainer.state.log_history if f"{level}/loss" in row]
    assert len(figures) == 3
    assert all(map(math.isfinite, figures))


def curvature_spoiled_once(tmp_path, **settings):
    transform = Spoiled((1, 0), stream=int(Stream.CURVATURE))
    return make_bissl_trainer(
        tmp_path, num_alternations=3, lower_steps=2, upper_steps=2, keywords={"lower_transform": transform}, **settings
    )


def test_a_spoiled_curvature_batch_is_named(tmp_path):
    with pytest.raises(DivergenceError, match=r"upper step 1 of alternation 2 .*: the input \(pixel_val"):
        curvature_spoiled_once(tmp_path).train()


def test_a_spoiled_curvature_batch_costs_one_solve_where_steps_may_be_left_out(tmp_path):
    trainer = curvature_spoiled_once(tmp_path, on_divergence="skip")
    trainer.train()
    assert [row["solver/non_finite"] for row in trainer.state.log_history if "solver/non_finite" in row] == [0, 1, 0]
    assert not_finite_weights(trainer.model) == []


def test_joint_training_leaves_out_a_step(tmp_path):
    trainer = make_joint_trainer(tmp_path, transform=Spoiled((0, 1)), on_divergence="skip")
    trainer.train()
    assert trainer.divergence.skipped == 1
    assert not_finite_weights(trainer.model) == []


def test_joint_training_names_the_step(tmp_path):
    trainer = make_joint_trainer(tmp_path, transform=Spoiled((1, 0)))
    with pytest.raises(DivergenceError, match=r"step 3 of epoch 2: the input \(pixel_values of the batch\)"):
        trainer.train()


def diverge_on_the_second_process(folder: str, way: str) -> None:
    trainer = make_trainer(folder, transform=Spoiled((1, 0), rank=1), per_device_train_batch_size=4, on_divergence=way)
    if way == "stop":
        with pytest.raises(DivergenceError, match=r"step 3 of epoch 2: the input \((pixel|of another)"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.divergence.skipped == 1
        assert not_finite_weights(trainer.model) == []


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["stop", "skip"])
def test_what_diverges_on_one_process_ends_all(tmp_path, way):
    run_in_processes(diverge_on_the_second_process, 2, str(tmp_path), way)


def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path):
    trainer = make_trainer(tmp_path, metric_for_best_model="loss")
    assert not trainer._determine_best_metric({"eval_loss": -math.inf}, None)
    assert not trainer._determine_best_metric({"eval_loss": math.nan}, None)
    assert trainer._determine_best_metric({"eval_loss": 2.0}, None)


def test_no_model_that_is_not_finite_is_written_or_loaded(tmp_path):
    model = tiny_model().lower
    next(model.parameters()).data.view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="hold NaN or infinity: the training has diverged"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="somewhere holds a model that has diverged"):
        with_finite_weights(model, "somewhere")


def test_a_start_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="hold NaN or infinity in pixel_values"):
        check_first_batch({"pixel_values": torch.tensor([math.inf])}, {})
    with pytest.raises(ValueError, match="The upper loss on the first examples is nan"):
        check_first_batch({}, {"upper loss": torch.tensor(math.nan)})


def test_figures_that_are_not_finite_are_no_result():
    check_metrics({"eval_loss": 1.0, "per_class": {}}, of="a model")
    with pytest.raises(DivergenceError, match=r"evaluation of a model is not finite \(eval_loss\)"):
        check_metrics({"eval_loss": math.nan}, of="a model")


def test_an_unknown_way_is_refused(tmp_path):
    with pytest.raises(ValueError, match="on_divergence is 'ignore'; it must be stop or skip"):
        make_trainer(tmp_path, on_divergence="ignore")
