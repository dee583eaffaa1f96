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
    ResNetConfig,
    ResNetForImageClassification,
)

import bissl_hf.trainer.level_curvature as level_curvature
from bissl_hf import BiSSLModel, BiSSLTrainer, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.curvature_memory import (
    MIN_PART_ROWS,
    SHARE_OF_MEMORY,
    extrapolate_bytes,
    halve,
    halvings_to_fit,
    most_halvings,
)
from bissl_hf.bilevel.gradient_cache import EmbeddingCurvature
from bissl_hf.data.alternation import StepKey, Stream

from ..conftest import NUM_LABELS, vit_model
from ..trainer.test_bissl_trainer import make_trainer, same_tensors

ROWS = 32
KEY = StepKey(7, int(Stream.UPPER), 0, 0, 0)


class ShortOfMemory(BiSSLTrainer):
    """Runs out of memory in the second product with a curvature that has given way less often than `fits_after`."""

    fits_after = 2

    def _build_curvature(self, inputs, key, halvings=0):
        curvature = super()._build_curvature(inputs, key, halvings)
        product, calls = curvature._product, []

        def failing(vector):
            calls.append(vector)
            if len(calls) > 1 and halvings < self.fits_after:
                raise torch.OutOfMemoryError("CUDA out of memory (by the test).")
            return product(vector)

        curvature._product = failing
        return curvature


def build(folder, *, cls=BiSSLTrainer, model=None, lower_rows=40, **settings):
    model = model or vit_model(projection_dims=(5,), dropout=0.0).double()
    return make_trainer(
        folder, cls=cls, model=model, dtype=torch.float64, lower_rows=lower_rows, **{
            "per_device_lower_batch_size": ROWS, "num_alternations": 2, "lower_steps": 1, "upper_steps": 3,
            "damping": 20.0, "solver_max_iterations": 3, "head_warmup_epochs": 0, **settings,
        },
    )  # fmt: skip


@pytest.fixture
def warnings(monkeypatch):
    said = set()
    monkeypatch.setattr(level_curvature.logger, "warning_once", said.add)
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
    assert trainer.curvature_halvings == 0
    assert not warnings


# Where it does


@pytest.mark.parametrize("solver", ["cg", "recycled"])
def test_a_run_that_gave_way_is_the_run_with_enough_memory(tmp_path, cached, warnings, solver):
    if solver == "recycled":
        whole = build(tmp_path / "whole", solver=solver)
        whole.train()
        cached = whole.model.state_dict()
    trainer = build(tmp_path / "short", cls=ShortOfMemory, solver=solver)
    trainer.train()
    assert trainer.curvature_halvings == 2
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
        trainer.curvature_halvings = number
        curvature = trainer._curvature_of(KEY)
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
    trainer = build(tmp_path_factory.mktemp("gave-way"), cls=ShortOfMemory, solver="recycled", **SAVING)
    trainer.train()
    return trainer


@pytest.mark.parametrize(("step", "has_record"), [(2, True), (3, True), (2, False)])
def test_a_run_that_gave_way_resumes_to_the_bit(tmp_path, gave_way, step, has_record):
    """Now there is enough memory: what was recorded decides."""
    resumed = build(tmp_path, solver="recycled", num_alternations=1)
    if not has_record:
        load = resumed.load_run_state
        resumed.load_run_state = lambda state: load({**state, "curvature_halvings": 0})
    resumed.train(resume_from_checkpoint=f"{gave_way.args.output_dir}/checkpoint-{step}")
    assert same_tensors(resumed.model.state_dict(), gave_way.model.state_dict()) is has_record


def test_a_resume_before_the_first_upper_step_decides_as_the_run_did(tmp_path, gave_way):
    resumed = build(tmp_path, cls=ShortOfMemory, solver="recycled", num_alternations=1)
    resumed.train(resume_from_checkpoint=f"{gave_way.args.output_dir}/checkpoint-1")
    assert same_tensors(resumed.model.state_dict(), gave_way.model.state_dict())


def test_the_record_is_part_of_a_checkpoint(gave_way):
    states = [Path(gave_way.args.output_dir, f"checkpoint-{step}", "run_state.json").read_text() for step in (1, 2)]
    assert [json.loads(state)["curvature_halvings"] for state in states] == [None, 2]


def test_a_resume_with_another_mode_takes_that_mode(tmp_path, gave_way):
    resumed = build(tmp_path, curvature_mode="cached", solver="recycled", num_alternations=1)
    resumed.train(resume_from_checkpoint=f"{gave_way.args.output_dir}/checkpoint-2")
    assert resumed.curvature_halvings == 0


# What users have chosen


def test_a_mode_that_was_chosen_is_kept(tmp_path, warnings):
    for mode in ("cached", "recompute"):
        trainer = build(tmp_path / mode, cls=ShortOfMemory, curvature_mode=mode)
        with pytest.raises(torch.OutOfMemoryError, match="by the test") as caught:
            trainer.train()
        assert "Set a smaller curvature_batch_size" in caught.value.__notes__[0]
    assert not warnings


def test_parts_that_were_chosen_are_halved(tmp_path, warnings, cached):
    trainer = build(tmp_path, cls=ShortOfMemory, lower_micro_batch_size=16, lower_gradient_cache=True)
    trainer.fits_after = 1
    trainer.train()
    assert_close(trainer.model.state_dict(), cached)
    assert ["in parts of 8" in warning for warning in warnings] == [True]


def test_micro_batches_with_losses_of_their_own_keep_them(tmp_path, warnings):
    """Taken one by one; their negatives are not to be drawn from elsewhere."""
    runs = [
        build(tmp_path / cls.__name__, cls=cls, lower_micro_batch_size=12) for cls in (BiSSLTrainer, ShortOfMemory)
    ]
    runs[1].fits_after = 1
    for run in runs:
        run.train()
    assert runs[1].curvature_halvings == 1
    assert_close(*(run.model.state_dict() for run in runs))
    assert ["one micro-batch at a time" in warning for warning in warnings] == [True]


def test_a_loss_of_ones_own_frees_its_graph(tmp_path):
    class Own(ShortOfMemory):
        fits_after = 1

        def compute_lower_loss(self, model, inputs):
            return 0.5 * super().compute_lower_loss(model, inputs)

    trainer = build(tmp_path, cls=Own)
    trainer.train()
    trainer.model.train()
    curvature = trainer._curvature_of(KEY)
    assert (type(curvature), curvature.mode) == (Curvature, "recompute")


def test_a_model_without_embeddings_frees_its_graph(tmp_path):
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BiSSLModel.from_models(BertForMaskedLM(config), BertForSequenceClassification(config))
    assert build(tmp_path, model=model)._most_halvings() == 1
    assert build(tmp_path)._most_halvings() == 2
    assert build(tmp_path, curvature_mode="cached")._most_halvings() == 0


def test_parts_that_cannot_be_halved_any_more_raise_with_advice(tmp_path):
    trainer = build(tmp_path, cls=ShortOfMemory)
    trainer.fits_after = 3
    with pytest.raises(torch.OutOfMemoryError, match="by the test") as caught:
        trainer.train()
    assert "Set a smaller curvature_batch_size" in caught.value.__notes__[0]
    assert trainer.curvature_halvings == 2


# The estimate


def saved_bytes(action, device):
    """Stands in for the allocator of a GPU: what autograd keeps while a function runs, at most."""
    held, peak, count = {}, 0, {}

    class Kept:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.place, self.bytes = storage.data_ptr(), storage.nbytes()
            count[self.place] = count.get(self.place, 0) + 1
            held[self.place] = self.bytes
            peak = max(peak, sum(held.values()))

        def __del__(self):
            count[self.place] -= 1
            if not count[self.place]:
                del held[self.place]

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        action()
    return peak


@pytest.fixture
def own_memory(monkeypatch):
    """A device whose memory is counted by what autograd keeps; returns how to set its size."""
    monkeypatch.setattr(level_curvature, "has_own_memory", lambda device: True)
    monkeypatch.setattr(level_curvature, "peak_growth", saved_bytes)

    def set_size(size):
        monkeypatch.setattr(level_curvature, "available_bytes", lambda device: size)

    return set_size


def curvature_batch(trainer):
    key = KEY._replace(stream=int(Stream.CURVATURE))
    return trainer.sources[Stream.CURVATURE].read(key), key


def test_the_estimate_is_what_the_whole_batch_takes(tmp_path):
    """For a network whose activations outweigh the comparisons of all rows, which grow with their square."""
    config = ResNetConfig(
        num_channels=1, embedding_size=64, hidden_sizes=[64, 128], depths=[1, 1], layer_type="basic",
        num_labels=NUM_LABELS,
    )  # fmt: skip
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(5,)))
    model = BiSSLModel.from_models(lower, ResNetForImageClassification(config)).double()
    trainer = build(tmp_path, model=model, lower_rows=80, per_device_lower_batch_size=64)
    trainer.model.train()
    inputs, key = curvature_batch(trainer)

    def measure(rows):
        part = {name: value[:rows] for name, value in inputs.items()}
        return saved_bytes(lambda: trainer._take_product(part, key, 0), trainer.args.device)

    assert extrapolate_bytes(measure, 64) == pytest.approx(measure(64), rel=0.05)
    assert measure(64) > 3 * measure(8), "the rest are weights"


@pytest.mark.parametrize(("share", "halvings"), [(2.0, 0), (0.7, 1), (0.4, 2), (0.001, 2)])
def test_the_estimate_decides_before_the_first_upper_step(tmp_path, own_memory, warnings, cached, share, halvings):
    trainer = build(tmp_path)
    trainer.model.train()
    inputs, key = curvature_batch(trainer)
    needed = saved_bytes(lambda: trainer._take_product(inputs, key, 0), trainer.args.device)
    own_memory(int(share * needed / SHARE_OF_MEMORY))
    trainer.train()
    assert trainer.curvature_halvings == halvings
    assert len(warnings) == (halvings > 0)
    assert_close(trainer.model.state_dict(), cached)


def test_a_mode_that_was_chosen_is_not_estimated(tmp_path, own_memory, warnings):
    own_memory(1)
    trainer = build(tmp_path, curvature_mode="cached", num_alternations=1)
    trainer.train()
    assert trainer.curvature_halvings == 0
    assert not warnings


def test_the_line_through_two_measurements():
    asked = []

    def measure(rows):
        asked.append(rows)
        return 1000 + 30 * rows

    assert extrapolate_bytes(measure, 256) == 1000 + 30 * 256
    assert asked == [16, 16, 32]
    assert extrapolate_bytes(lambda rows: 500 - rows, 256) == 484, "a line that falls is level"
    assert extrapolate_bytes(measure, 31) is None


def test_halvings_leave_parts_that_fit():
    for needed, available in ((1, 100), (80, 100), (81, 100), (1000, 100), (10**12, 1), (5, 0)):
        halvings = halvings_to_fit(needed, available)
        assert needed / 2**halvings <= SHARE_OF_MEMORY * max(available, 1)
        assert halvings == 0 or needed / 2 ** (halvings - 1) > SHARE_OF_MEMORY * max(available, 1)
    assert [halve(rows, 2) for rows in (1, 4, 5, 1024)] == [1, 1, 2, 256]
    for rows in (1, MIN_PART_ROWS, 2 * MIN_PART_ROWS - 1, 2 * MIN_PART_ROWS, 1000, 1024):
        most = most_halvings(rows)
        assert most == 0 or halve(rows, most) >= MIN_PART_ROWS
        assert halve(rows, most + 1) < MIN_PART_ROWS + 1
