"""A curvature that does not fit: what it gives way to, that the results stay, and that a resume takes the same. Memory
is short because the tests say so; `test_gpu.py` has the real thing."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from bissl_hf import BiSSLModel, BiSSLTrainer
from bissl_hf.bilevel import upper_phase
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.gauss_newton import GaussNewton
from bissl_hf.bilevel.gradient_cache import EmbeddingCurvature
from bissl_hf.bilevel.upper_phase import MIN_PART_ROWS, UpperPhase
from bissl_hf.models.convex_outputs import convex_outputs
from bissl_hf.trainer import bissl_trainer

from ..conftest import vit_model
from ..trainer.trainers import make_trainer, same_tensors

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
        weights = self.model.backbone_parameters("lower")
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
    config = bert_config(num_labels=3)
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


# Gauss-Newton matrices


def bert_config(**settings):
    return BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **settings,
    )  # fmt: skip


def masked_words():
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 20, (6, 5), generator=generator)
    labels = torch.where(torch.rand(6, 5, generator=generator) < 0.4, words, -100)
    return {"input_ids": words.masked_fill(labels >= 0, 0), "labels": labels}


def pairs_of_images():
    return {"pixel_values": torch.rand(6, 2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}


def lower_of(kind):
    """A lower model whose loss is convex in known outputs, with a batch of it."""
    torch.manual_seed(0)
    if kind == "simclr":
        return vit_model(projection_dims=(5,), dropout=0.0).lower.double(), pairs_of_images()
    if kind == "masked words":
        return BertForMaskedLM(bert_config()).double(), masked_words()
    vit = {
        "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 8,
    }  # fmt: skip
    images = pairs_of_images()["pixel_values"][:, 0]
    if kind == "rotations":
        labels = torch.arange(6) % 4
        return ViTForImageClassification(ViTConfig(num_labels=4, **vit)).double(), {
            "pixel_values": images, "labels": labels
        }  # fmt: skip
    decoder = {"decoder_hidden_size": 8, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = ViTMAEConfig(mask_ratio=0.5, decoder_intermediate_size=8, **decoder, **vit)
    return ViTMAEForPreTraining(config).double(), {"pixel_values": images}


@pytest.mark.parametrize("kind", ["simclr", "masked words", "rotations", "masked patches"])
def test_outputs_give_the_loss_and_a_gauss_newton_product(kind):
    """Against J v by two backward passes and plain second derivatives of the loss in the outputs."""
    model, inputs = lower_of(kind)
    with sdpa_kernel(SDPBackend.MATH):
        check_outputs(model, inputs)


def check_outputs(model, inputs):
    known = convex_outputs(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    vector = [torch.randn_like(p) for p in parameters]
    state = torch.get_rng_state()

    def rows():
        torch.set_rng_state(state)
        return known.rows(model, inputs)

    def loss_of(rows):
        return known.loss(known.join(rows) if known.join else rows, inputs)

    outputs = rows()
    torch.set_rng_state(state)
    assert loss_of(outputs).item() == pytest.approx(model(**inputs).loss.item(), rel=1e-12)

    def joined(rows):
        return known.join(rows) if known.join else rows

    values = joined(rows())
    weights = torch.zeros_like(values, requires_grad=True)
    finite = torch.isfinite(values)
    pulled = torch.autograd.grad(
        torch.where(finite, values, 0.0), parameters, weights, create_graph=True, materialize_grads=True,
        allow_unused=True,
    )  # fmt: skip
    pairs = [(g, v) for g, v in zip(pulled, vector, strict=True) if g.requires_grad]
    (tangent,) = torch.autograd.grad([g for g, _ in pairs], weights, [v for _, v in pairs])
    leaf = values.detach().requires_grad_()
    (slope,) = torch.autograd.grad(known.loss(leaf, inputs), leaf, create_graph=True)
    (curved,) = torch.autograd.grad(slope, leaf, torch.where(finite, tangent, 0.0))
    expected = torch.autograd.grad(
        torch.where(finite, joined(rows()), 0.0), parameters, torch.where(finite, curved, 0.0), allow_unused=True
    )
    torch.set_rng_state(state)
    matrix = GaussNewton(rows, lambda found: known.loss(found, inputs), parameters, join=known.join)
    for found, row in zip(matrix(vector), expected, strict=True):
        wanted = torch.zeros_like(found) if row is None else row
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-10)


def test_a_run_with_gauss_newton_in_parts_is_that_of_the_whole_batch(tmp_path):
    settings = {"curvature_kind": "gauss_newton", "damping": 1.0}
    runs = [build(tmp_path / "whole", **settings), build(tmp_path / "parts", phase=ShortOfMemory, **settings)]
    for run in runs:
        run.train()
        assert sum(log.get("solver/negative_curvature", 0.0) for log in run.state.log_history) == 0
    assert runs[1].upper_phase.halvings == 2
    assert_close(*(run.model.state_dict() for run in runs), atol=1e-9)
    runs[0].model.train()
    assert isinstance(runs[0].upper_phase.curvature(0), GaussNewton)


def test_a_weighed_loss_weighs_its_gauss_newton_matrix(tmp_path):
    products = []
    for cls in (BiSSLTrainer, Doubled):
        trainer = build(tmp_path, cls=cls, curvature_kind="gauss_newton")
        trainer.model.train()
        matrix = trainer.upper_phase.curvature(0)
        products.append(matrix(tuple(torch.ones_like(part) for part in matrix.parameters)))
    assert_close(products[1], tuple(2.0 * part for part in products[0]))


def test_gauss_newton_is_refused_where_it_is_not_known(tmp_path):
    multi = BertForSequenceClassification(bert_config(problem_type="multi_label_classification", num_labels=3))
    model = BiSSLModel.from_models(multi, BertForSequenceClassification(bert_config(num_labels=3)))
    with pytest.raises(ValueError, match="of its outputs the loss of BertForSequenceClassification is convex"):
        build(tmp_path, model=model, curvature_kind="gauss_newton")
    with pytest.raises(ValueError, match="with lower_micro_batch_size each part of a batch has a loss of its own"):
        build(tmp_path, curvature_kind="gauss_newton", lower_micro_batch_size=8)
