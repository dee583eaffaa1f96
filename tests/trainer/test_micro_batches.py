"""Batches split inside their step against whole batches, in float64 and with models without batch statistics."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from bissl_hf import BiSSLModel, BiSSLTrainer
from bissl_hf.bilevel import upper_phase
from bissl_hf.bilevel.level_losses import LevelLosses
from bissl_hf.data.alternation import StepKey
from bissl_hf.data.streams import model_randomness

from ..conftest import TinyImages, vit_model
from .trainers import all_equal, make_trainer, recorded, snapshot

CACHED = {"lower_micro_batch_size": 3, "lower_gradient_cache": True}
# A batch of 8 in parts of 3, 3 and 2.
SETTINGS = {"damping": 20.0, "solver_max_iterations": 3}


def layer_norm_model(dropout: float = 0.0) -> BiSSLModel:
    return vit_model(projection_dims=(5,), dropout=dropout).double()


def train(output_dir, **settings):
    trainer = make_trainer(output_dir, model=layer_norm_model(), dtype=torch.float64, **{**SETTINGS, **settings})
    trainer.train()
    return trainer


def largest_difference(first: dict, second: dict) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> BiSSLTrainer:
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("split", [CACHED, {"upper_micro_batch_size": 2}, {**CACHED, "upper_micro_batch_size": 4}])
def test_a_run_in_parts_is_the_run_on_whole_batches(tmp_path, whole, split):
    parts = train(tmp_path, **split)
    assert largest_difference(parts.model.state_dict(), whole.model.state_dict()) < 1e-10
    start = layer_norm_model().lower.state_dict()
    assert largest_difference(parts.model.lower.state_dict(), start) > 1e-3
    for found, expected in zip(parts.state.log_history, whole.state.log_history, strict=True):
        for name in found.keys() & {"lower/loss", "upper/loss", "lower/gradient_norm", "upper/gradient_norm"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-10), name


def test_without_the_cache_the_negatives_come_from_the_part(tmp_path, whole):
    parts = train(tmp_path, lower_micro_batch_size=4)
    losses = [trainer.state.log_history[0]["lower/loss"] for trainer in (parts, whole)]
    assert losses[0] < losses[1] - 0.3, "log 7 and log 15 where all are alike"


def test_one_solve_per_step_whatever_the_parts(tmp_path, monkeypatch):
    solves = []

    def counting(curvature, rhs, **keywords):
        solves.append(snapshot(rhs))
        return solve(curvature, rhs, **keywords)

    solve = upper_phase.implicit_gradient
    monkeypatch.setattr(upper_phase, "implicit_gradient", counting)
    for size in (None, 2):
        train(tmp_path, upper_micro_batch_size=size, num_alternations=1, upper_steps=2)
    assert len(solves) == 4
    for first, second in zip(solves[:2], solves[2:], strict=True):
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_both_passes_see_the_same_dropout_masks(tmp_path):
    trainer = make_trainer(
        tmp_path, model=layer_norm_model(dropout=0.3), dtype=torch.float64, num_alternations=1, **CACHED
    )
    model = trainer.model.train()
    parameters = list(model.lower.parameters())
    pixels = TinyImages(8, pairs=True, dtype=torch.float64).images
    key = StepKey(7, 0, 0, 0, 0)
    with model_randomness(key):
        embeddings = torch.cat([model.lower(part, return_loss=False).embeddings for part in pixels.split([2, 3, 3])])
        whole = model.lower.loss_from_embeddings(embeddings)
        undisturbed = torch.rand(1)
    expected = torch.autograd.grad(whole, parameters, allow_unused=True)
    with model_randomness(key):
        terms = [
            term()
            for term in trainer.losses.lower_terms(model.without_side_effects("lower"), {"pixel_values": pixels}, key)
        ]
        assert torch.equal(torch.rand(1), undisturbed)
    assert len(terms) == 3
    found = torch.autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)
    assert torch.stack(terms).sum().item() == pytest.approx(whole.item(), rel=1e-13)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_the_pull_is_estimated_in_parts(tmp_path, monkeypatch):
    rows = []

    embed = LevelLosses.embed

    def counting(losses, model, part):
        rows.append(len(part["pixel_values"]))
        return embed(losses, model, part)

    monkeypatch.setattr(LevelLosses, "embed", counting)
    pulls = [
        make_trainer(
            tmp_path, model=layer_norm_model(), dtype=torch.float64, lower_optim="lars", **split
        ).estimate_pull()
        for split in ({}, CACHED)
    ]
    assert rows == [2, 3, 3] * 2
    assert pulls[0] > 0
    assert pulls[1] == pytest.approx(pulls[0], rel=1e-12)


def test_running_statistics_move_once_per_part(tmp_path):
    def statistics(trainer):
        return snapshot(buffer for buffer in trainer.model.lower.buffers() if buffer.dtype == torch.long)

    _, steps = recorded(statistics, tmp_path, num_alternations=1, lower_micro_batch_size=4, lower_gradient_cache=True)
    for level, before, after in steps:
        expected = 4 if level == "lower" else 0  # two views of two parts
        assert all_equal(after, [count + expected for count in before])
        assert before


def test_the_parts_resume_to_the_bit(tmp_path):
    settings = {
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "num_alternations": 1, **CACHED
    }  # fmt: skip
    runs = [
        make_trainer(tmp_path / name, model=layer_norm_model(0.2), dtype=torch.float64, **settings) for name in "ab"
    ]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=f"{tmp_path}/a/checkpoint-2")
    assert all_equal(*(run.model.state_dict().values() for run in runs))


def test_the_cache_needs_a_loss_of_embeddings(tmp_path):
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = BiSSLModel.from_models(BertForMaskedLM(config), BertForSequenceClassification(config))
    with pytest.raises(ValueError, match="needs a lower model with `loss_from_embeddings`, which BertForMaskedLM"):
        make_trainer(tmp_path, model=model, **CACHED)


def test_a_loss_of_ones_own_goes_through_the_cache(tmp_path):
    """It sees the whole batch, whose embeddings were taken in parts, and may log, weigh and add to it."""
    seen = []

    class Own(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            outputs = model(**inputs)
            seen.append(len(outputs.embeddings))
            return 2 * outputs.loss + outputs.embeddings.square().mean()

    runs = [
        make_trainer(
            tmp_path / name, cls=Own, model=layer_norm_model(), dtype=torch.float64, num_alternations=1, **settings
        )
        for name, settings in (("whole", {}), ("parts", CACHED))
    ]
    for run in runs:
        seen.clear()
        run.train()
        assert set(seen) == {8}
    assert largest_difference(*(run.model.state_dict() for run in runs)) < 1e-10


def test_a_loss_that_the_cache_cannot_take_is_refused(tmp_path):
    class RunsTwice(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            return model(**inputs).loss + model(pixel_values=0.5 * inputs["pixel_values"]).loss

    class Penalised(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            return model(**inputs).loss + sum((p**2).sum() for p in self.model.backbone_parameters("lower"))

    for cls, message in ((RunsTwice, "runs the model on other inputs"), (Penalised, "uses parameters beside")):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, cls=cls, model=layer_norm_model(), dtype=torch.float64, **CACHED).train()
