"""A curvature that does not fit: what it gives way to, that the results stay, and that a resume takes the same. Memory
is short because the tests say so; `test_gpu.py` has the real thing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

from bissl_hf import BiSSLModel, BiSSLTrainer
from bissl_hf.bilevel import upper_phase
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.gradient_cache import EmbeddingCurvature
from bissl_hf.bilevel.upper_phase import MIN_PART_ROWS, UpperPhase
from bissl_hf.trainer import bissl_trainer

from ..conftest import vit_model
from ..trainer.test_bissl_trainer import make_trainer, same_tensors

ROWS = 32


class ShortOfMemory(UpperPhase):
    """Runs out of memory in the second product with a curvature whose parts were halved less than `fits_after`
    times."""

    fits_after = 2

    def _build_curvature(self, inputs, key):
        curvature = super()._build_curvature(inputs, key)
        product, calls, halvings = curvature._product, [], self.halvings

        def failing(vector):
            calls.append(vector)
            if len(calls) > 1 and halvings < self.fits_after:
                raise torch.OutOfMemoryError("CUDA out of memory (by the test).")
            return product(vector)

        curvature._product = failing
        return curvature


def build(folder, *, phase=UpperPhase, cls=BiSSLTrainer, model=None, lower_rows=40, fits_after=2, **settings):
    model = model or vit_model(projection_dims=(5,), dropout=0.0).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bissl_trainer, "UpperPhase", phase)
        trainer = make_trainer(
            folder, cls=cls, model=model, dtype=torch.float64, lower_rows=lower_rows, **{
                "per_device_lower_batch_size": ROWS, "num_alternations": 2, "lower_steps": 1, "upper_steps": 3,
                "damping": 20.0, "solver_max_iterations": 3, "head_warmup_epochs": 0, **settings,
            },
        )  # fmt: skip
    trainer.upper_phase.fits_after = fits_after
    return trainer


@pytest.fixture
def warnings(monkeypatch):
    said = set()
    monkeypatch.setattr(upper_phase.logger, "warning_once", said.add)
    return said


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("cached"), curvature_mode="cached")
    trainer.train()
    return trainer.model.state_dict()


def assert_close(found, expected, atol=1e-11):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


# Where nothing overflows


def test_auto_is_cached_to_the_bit_while_it_fits(tmp_path, cached, warnings):
    trainer = build(tmp_path)
    assert trainer.args.curvature_mode == "auto"
    trainer.train()
    assert same_tensors(trainer.model.state_dict(), cached)
    assert trainer.upper_phase.halvings == 0
    assert not warnings


# Where it does


@pytest.mark.parametrize("solver", ["cg", "recycled"])
def test_a_run_that_gave_way_is_the_run_with_enough_memory(tmp_path, cached, warnings, solver):
    if solver == "recycled":
        whole = build(tmp_path / "whole", solver=solver)
        whole.train()
        cached = whole.model.state_dict()
    trainer = build(tmp_path / "short", phase=ShortOfMemory, solver=solver)
    trainer.train()
    assert trainer.upper_phase.halvings == 2
    assert_close(trainer.model.state_dict(), cached)
    (warning,) = warnings
    assert "(32 rows) does not fit" in warning
    assert "in parts of 8" in warning
    logs = [log for log in trainer.state.log_history if "solver/iterations" in log]
    assert [log["solver/iterations"] for log in logs] == [3.0, 3.0], "an interrupted solve is not counted"


@pytest.mark.parametrize("halvings", [1, 2])
def test_products_after_giving_way_are_those_of_the_whole_batch(tmp_path, halvings):
    products = []
    for number in (0, halvings):
        trainer = build(tmp_path)
        trainer.model.train()
        trainer.upper_phase.halvings = number
        curvature = trainer.upper_phase.curvature(0)
        assert isinstance(curvature, EmbeddingCurvature) is (number > 0)
        generator = torch.Generator().manual_seed(0)
        vector = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in curvature.parameters]
        products.append((*curvature(vector), *curvature.gradient))
    assert max(float(part.abs().max()) for part in products[0]) > 1e-2
    assert_close(products[1], products[0], atol=1e-12)


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "num_alternations": 1}


@pytest.fixture(scope="module")
def gave_way(tmp_path_factory):
    """In its first upper step, with a checkpoint of each."""
    trainer = build(tmp_path_factory.mktemp("gave-way"), phase=ShortOfMemory, solver="recycled", **SAVING)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("step", "has_record"), [(2, True), (3, True), (2, False)])
def test_a_run_that_gave_way_resumes_to_the_bit(tmp_path, gave_way, step, has_record):
    """Now there is enough memory: what was recorded decides."""
    resumed = build(tmp_path, solver="recycled", num_alternations=1)
    if not has_record:
        load = resumed.upper_phase.load_state_dict
        resumed.upper_phase.load_state_dict = lambda state: load({**state, "halvings": 0})
    resumed.train(resume_from_checkpoint=f"{gave_way.args.output_dir}/checkpoint-{step}")
    assert same_tensors(resumed.model.state_dict(), gave_way.model.state_dict()) is has_record


def test_a_resume_before_the_first_upper_step_decides_as_the_run_did(tmp_path, gave_way):
    resumed = build(tmp_path, phase=ShortOfMemory, solver="recycled", num_alternations=1)
    resumed.train(resume_from_checkpoint=f"{gave_way.args.output_dir}/checkpoint-1")
    assert same_tensors(resumed.model.state_dict(), gave_way.model.state_dict())


def test_the_record_is_part_of_a_checkpoint(gave_way):
    states = [Path(gave_way.args.output_dir, f"checkpoint-{step}", "run_state.json").read_text() for step in (1, 2)]
    assert [json.loads(state)["state"]["upper_phase"]["halvings"] for state in states] == [0, 2]


def test_a_resume_with_another_mode_takes_that_mode(tmp_path, gave_way):
    resumed = build(tmp_path, curvature_mode="cached", solver="recycled", num_alternations=1)
    resumed.train(resume_from_checkpoint=f"{gave_way.args.output_dir}/checkpoint-2")
    assert resumed.upper_phase.halvings == 0


# What users have chosen


def test_a_mode_that_was_chosen_is_kept(tmp_path, warnings):
    for mode in ("cached", "recompute"):
        trainer = build(tmp_path / mode, phase=ShortOfMemory, curvature_mode=mode)
        with pytest.raises(torch.OutOfMemoryError, match="by the test") as caught:
            trainer.train()
        assert "Set a smaller curvature_batch_size" in caught.value.__notes__[0]
    assert not warnings


def test_parts_that_were_chosen_are_halved(tmp_path, warnings, cached):
    trainer = build(tmp_path, phase=ShortOfMemory, fits_after=1, lower_micro_batch_size=16, lower_gradient_cache=True)
    trainer.train()
    assert_close(trainer.model.state_dict(), cached)
    assert ["in parts of 8" in warning for warning in warnings] == [True]


def test_micro_batches_with_losses_of_their_own_keep_them(tmp_path, warnings):
    """Taken one by one; their negatives are not to be drawn from elsewhere."""
    runs = [
        build(tmp_path / phase.__name__, phase=phase, fits_after=1, lower_micro_batch_size=12)
        for phase in (UpperPhase, ShortOfMemory)
    ]
    for run in runs:
        run.train()
    assert runs[1].upper_phase.halvings == 1
    assert_close(*(run.model.state_dict() for run in runs))
    assert ["one micro-batch at a time" in warning for warning in warnings] == [True]


class Doubled(BiSSLTrainer):
    def compute_lower_loss(self, model, inputs):
        return 2.0 * super().compute_lower_loss(model, inputs)


class RunsTwice(BiSSLTrainer):
    def compute_lower_loss(self, model, inputs):
        darker = {"pixel_values": 0.5 * inputs["pixel_values"]}
        return super().compute_lower_loss(model, inputs) + super().compute_lower_loss(model, darker)


class Penalised(BiSSLTrainer):
    def compute_lower_loss(self, model, inputs):
        weights = self.model.lower_shared_parameters()
        return super().compute_lower_loss(model, inputs) + 0.01 * sum((w**2).sum() for w in weights)


def test_a_loss_of_ones_own_that_uses_the_embeddings_is_taken_in_parts(tmp_path):
    runs = [
        build(tmp_path / phase.__name__, cls=Doubled, phase=phase, fits_after=1)
        for phase in (UpperPhase, ShortOfMemory)
    ]
    for run in runs:
        run.train()
    assert_close(*(run.model.state_dict() for run in runs))
    runs[1].model.train()
    assert isinstance(runs[1].upper_phase.curvature(0), EmbeddingCurvature)


@pytest.mark.parametrize("cls", [RunsTwice, Penalised])
def test_any_other_loss_of_ones_own_frees_its_graph(tmp_path, cls):
    runs = [
        build(tmp_path / phase.__name__, cls=cls, phase=phase, fits_after=1) for phase in (UpperPhase, ShortOfMemory)
    ]
    for run in runs:
        run.train()
    assert_close(*(run.model.state_dict() for run in runs))
    runs[1].model.train()
    curvature = runs[1].upper_phase.curvature(0)
    assert (type(curvature), curvature.mode) == (Curvature, "recompute")


def test_a_model_without_embeddings_frees_its_graph(tmp_path):
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BiSSLModel.from_models(BertForMaskedLM(config), BertForSequenceClassification(config))
    assert build(tmp_path, model=model).upper_phase._most_halvings() == 1
    assert build(tmp_path).upper_phase._most_halvings() == 2
    assert build(tmp_path, curvature_mode="cached").upper_phase._most_halvings() == 0


def test_parts_that_cannot_be_halved_any_more_raise_with_advice(tmp_path):
    trainer = build(tmp_path, phase=ShortOfMemory, fits_after=3)
    with pytest.raises(torch.OutOfMemoryError, match="by the test") as caught:
        trainer.train()
    assert "Set a smaller curvature_batch_size" in caught.value.__notes__[0]
    assert trainer.upper_phase.halvings == 2


def test_parts_stay_large_enough(tmp_path):
    for rows in (MIN_PART_ROWS, 2 * MIN_PART_ROWS - 1, 2 * MIN_PART_ROWS, 40):
        phase = build(tmp_path, curvature_batch_size=rows).upper_phase
        phase.halvings = phase._most_halvings()
        assert phase.halvings == 0 or phase._part_rows(rows) >= MIN_PART_ROWS
        phase.halvings += 1
        assert phase._part_rows(rows) < MIN_PART_ROWS + 1


def test_one_process_of_several_does_not_try_again_alone(tmp_path, monkeypatch):
    trainer = build(tmp_path, phase=ShortOfMemory)
    monkeypatch.setattr(upper_phase, "world_size", lambda: 2)
    with pytest.raises(torch.OutOfMemoryError, match="by the test") as caught:
        trainer.train()
    assert "Set a smaller curvature_batch_size" in caught.value.__notes__[0]
    assert trainer.upper_phase.halvings == 0
