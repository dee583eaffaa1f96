"""No step waits for the device. On the device `meta` tensors have no values, so that reading one raises."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from bissl_hf.benchmark.measuring import SynchronisationCounter
from bissl_hf.data.alternation import StepKey, Stream
from bissl_hf.data.augment import TrainTransform, TwoViewTransform
from bissl_hf.trainer.training_args import BiSSLTrainingArguments

from .trainers import make_trainer

META = torch.device("meta")


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BiSSLTrainingArguments, "device", property(lambda args: META))
    # 2026-11: torch 2.13 has no autocast for `meta`; without mixed precision it does nothing anyway.
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())


def batches(trainer) -> Iterator[tuple[StepKey, dict]]:
    for stream, steps in ((Stream.LOWER, trainer.args.lower_steps), (Stream.UPPER, trainer.args.upper_steps)):
        for step in range(steps):
            key = StepKey(0, int(stream), 0, step, 0)
            yield key, trainer.streams.sources[stream].read(key)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lower_optim": "lars", "lower_max_grad_norm": 0.0, "max_grad_norm": 0.0},
        {"lower_optim": "adamw", "optim": "adamw", "solver": "blockwise_cg"},
        {"solver": "identity", "direct_weight": 0.0},
        {"curvature_mode": "recompute", "lower_micro_batch_size": 4, "upper_micro_batch_size": 3},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_no_step_reads_a_value_from_the_device(tmp_path, on_meta, settings):
    trainer = make_trainer(tmp_path, lower_steps=2, **settings)
    trainer.model.to(META)
    trainer.create_optimizer()
    scheduler = trainer.create_scheduler(10)
    for key, inputs in batches(trainer):
        with SynchronisationCounter(META) as counter:
            loss = trainer.training_step(trainer.model, {"key": key, "inputs": inputs})
            trainer._get_grad_norm(trainer.model)
            trainer.optimizer.step()
            scheduler.step()
            trainer.optimizer.zero_grad()
        assert counter.found == []
        assert loss.device == META


def test_a_tolerance_reads_at_most_one_value_per_iteration(tmp_path):
    """Counted on the CPU, where the solver looks at its status before each iteration, tolerance or not."""
    trainer = make_trainer(tmp_path, solver_tolerance=1e-9, solver_max_iterations=4, lower_optim="lars")
    trainer.create_optimizer()
    for key, inputs in batches(trainer):
        with SynchronisationCounter(torch.device("cpu")) as counter:
            trainer.training_step(trainer.model, {"key": key, "inputs": inputs})
            trainer._get_grad_norm(trainer.model)
            trainer.optimizer.step()
        assert counter.count <= (0 if key.stream == Stream.LOWER else 4)


@pytest.mark.parametrize("transform", [TrainTransform(16), TwoViewTransform(16)], ids=lambda t: type(t).__name__)
def test_views_do_not_wait(on_meta, transform):
    images = {"pixel_values": torch.zeros(4, 3, 20, 20, dtype=torch.uint8, device=META)}
    with SynchronisationCounter(META) as counter:
        transform(images, (0, 1))
    assert counter.found == []


@pytest.mark.gpu
def test_no_step_waits_for_the_gpu(tmp_path):
    """The driver raises where the host waits. The first alternation, which allocates, may."""
    trainer = make_trainer(tmp_path, use_cpu=False, lower_optim="lars")
    trainer.create_optimizer()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for key, inputs in batches(trainer):
                trainer.training_step(trainer.model, {"key": key, "inputs": inputs})
                trainer._get_grad_norm(trainer.model)
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")
