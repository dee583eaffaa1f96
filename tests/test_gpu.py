"""What only a GPU can show: its runs against those of a CPU in float64, determinism, memory, and no waiting.

    make test-gpu

runs this file and everything else that is marked `gpu`.
"""

import os

# Read when cuBLAS starts; `torch.use_deterministic_algorithms` insists on it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import gc
from contextlib import contextmanager

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from bissl_hf import BiSSLModel, BiSSLTrainer, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.bilevel import upper_phase
from bissl_hf.data.alternation import StepKey, Stream

from .conftest import NUM_LABELS, tiny_model, vit_model
from .optim.test_precision import layer_norm_trainer, on_each_device
from .trainer.trainers import all_equal, make_args, make_trainer

CACHED = {"lower_micro_batch_size": 3, "lower_gradient_cache": True, "upper_micro_batch_size": 2}


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """Convolutions without TF32, whose products have ten bits. Other products have it off by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def moved(trainer) -> torch.Tensor:
    """How far a run moves the parameters of both levels."""
    start = [parameter.detach().clone().double().cpu() for parameter in trainer.model.parameters()]
    trainer.train()
    end = [parameter.detach().double().cpu() for parameter in trainer.model.parameters()]
    return torch.cat([(new - old).reshape(-1) for new, old in zip(end, start, strict=True)])


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> torch.Tensor:
    """A run on a CPU in float64, whose algorithm the tests of the trainer hold against its restatement."""
    return moved(layer_norm_trainer(tmp_path_factory.mktemp("reference"), dtype=torch.float64, damping=60.0))


@on_each_device
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"dtype": torch.float64}, 1e-9),
        ({"dtype": torch.float64, **CACHED}, 1e-9),
        ({}, 1e-4),
        ({"bf16": True}, 0.1),
        ({"fp16": True}, 0.02),
        ({"bf16": True, **CACHED}, 0.1),
    ],
    ids=["float64", "float64-parts", "float32", "bf16", "fp16", "bf16-parts"],
)
def test_a_run_is_that_of_a_cpu_in_float64(tmp_path, reference, settings, tolerance, device):
    """Two alternations of both levels, relative to how far they move the weights."""
    found = moved(layer_norm_trainer(tmp_path, device=device, damping=60.0, **settings))
    assert float(reference.norm()) > 1e-2
    assert float((found - reference).norm() / reference.norm()) < tolerance


@on_each_device
@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bf16", "fp16"])
@pytest.mark.parametrize("build", [tiny_model, vit_model], ids=["batch-norm", "dropout"])
def test_deterministic_algorithms_give_the_same_bits_twice(tmp_path, build, precision, device):
    runs = []
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("first", "second"):
            trainer = make_trainer(
                tmp_path / name, model=build(), num_alternations=1, use_cpu=device == "cpu", **precision
            )
            trainer.train()
            runs.append([value.cpu() for value in trainer.model.state_dict().values()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all_equal(*runs)
    start = build().state_dict().values()
    assert not all_equal(runs[0], start)


# Memory


class LargeImages(torch.utils.data.Dataset):
    """Images on which the activations of a small network outweigh its parameters."""

    def __init__(self, rows: int, *, pairs: bool) -> None:
        self.rows, self.pairs = rows, pairs

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        images = torch.rand(2 if self.pairs else 1, 3, 64, 64, generator=generator)
        return {"pixel_values": images} if self.pairs else {"pixel_values": images[0], "labels": index % NUM_LABELS}


def large_trainer(output_dir, **settings):
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128], depths=[2, 2], layer_type="basic", num_labels=NUM_LABELS
    )
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config))
    model = BiSSLModel.from_models(lower, ResNetForImageClassification(config))
    trainer = BiSSLTrainer(
        model,
        make_args(output_dir, use_cpu=False, **settings),
        train_dataset=LargeImages(64, pairs=False),
        lower_dataset=LargeImages(512, pairs=True),
    )
    trainer.create_optimizer()
    return trainer


def batch_on_the_device(trainer, stream: Stream, step: int = 0) -> dict:
    key = StepKey(7, int(stream), 0, step, 0)
    inputs = trainer.streams.sources[stream].read(key)
    return {"key": key, "inputs": {name: value.to(trainer.args.device) for name, value in inputs.items()}}


def curvature_of(trainer):
    """The curvature of the first alternation, and a vector to multiply; a first product has been taken."""
    trainer.model.train()
    curvature = trainer.upper_phase.curvature(0)
    vector = curvature.gradient
    curvature(vector)
    return curvature, vector


def peak_of(action, *arguments) -> int:
    """Bytes that are allocated at most while `action(*arguments)` runs, above those before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action(*arguments)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_of_a_lower_step(trainer) -> int:
    batch = batch_on_the_device(trainer, Stream.LOWER)
    trainer.training_step(trainer.model, batch)  # allocates gradients and the workspaces of cuDNN
    return peak_of(trainer.training_step, trainer.model, batch)


@pytest.mark.gpu
def test_the_memory_of_cached_gradients_does_not_grow_with_the_batch(tmp_path):
    """A lower step, and a product with the Hessian: one part at a time, beside the views and the embeddings."""
    parts = {"lower_micro_batch_size": 16, "lower_gradient_cache": True}
    whole, cached, products = [], [], []
    for rows in (32, 128):
        whole.append(peak_of_a_lower_step(large_trainer(tmp_path, per_device_lower_batch_size=rows)))
        trainer = large_trainer(tmp_path, per_device_lower_batch_size=rows, **parts)
        cached.append(peak_of_a_lower_step(trainer))
        products.append(peak_of(*curvature_of(trainer)))
    assert whole[1] > 2 * whole[0]
    assert cached[1] < 1.2 * cached[0]
    assert products[1] < 1.2 * products[0]


@pytest.mark.gpu
def test_a_recomputed_curvature_holds_nothing_between_products(tmp_path):
    held = {}
    for mode in ("cached", "recompute"):
        trainer = large_trainer(tmp_path, per_device_lower_batch_size=64, curvature_mode=mode)
        curvature, vector = curvature_of(trainer)
        gc.collect()
        before = torch.cuda.memory_allocated()
        trainer.upper_phase.leave()
        del curvature, vector
        gc.collect()
        held[mode] = before - torch.cuda.memory_allocated()
    parameters = 4 * sum(p.numel() for p in trainer.model.backbone_parameters("lower"))
    batch = 4 * 64 * 2 * 3 * 64 * 64
    assert held["recompute"] < 1.5 * (parameters + batch), "the batch and the gradient"
    assert held["cached"] > 10 * held["recompute"]


def measured_product(trainer) -> int:
    """Bytes that the first product of an upper phase takes at most, the graph included."""
    trainer.model.train()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    curvature = trainer.upper_phase.curvature(0)
    curvature(curvature.gradient)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    trainer.upper_phase.leave()
    return peak


@contextmanager
def at_most(bytes_more: float):
    """Lets this process allocate so much beyond what it holds."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + bytes_more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.gpu
def test_a_curvature_that_does_not_fit_is_taken_in_parts_and_the_step_goes_on(tmp_path, monkeypatch):
    """The process is allowed 0.6 of what the cached graph takes. An upper step is that of a trainer which takes the
    same parts with plenty of memory."""
    said, gradients = [], []
    monkeypatch.setattr(upper_phase.logger, "warning_once", said.append)
    trainers = [large_trainer(tmp_path, per_device_lower_batch_size=128) for _ in range(2)]
    needed, batch = measured_product(trainers[0]), batch_on_the_device(trainers[0], Stream.UPPER)
    with at_most(0.6 * needed):
        trainers[0].training_step(trainers[0].model, batch)
    assert trainers[0].upper_phase.halvings >= 1
    assert len(said) == trainers[0].upper_phase.halvings
    trainers[1].upper_phase.halvings = trainers[0].upper_phase.halvings
    trainers[1].training_step(trainers[1].model, batch)
    for trainer in trainers:
        gradients.append(torch.cat([p.grad.reshape(-1) for p in trainer.model.backbone_parameters("upper")]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * float(gradients[1].abs().max()))


@pytest.mark.gpu
def test_a_mode_that_was_chosen_runs_out_of_memory(tmp_path):
    trainer = large_trainer(tmp_path, per_device_lower_batch_size=128, curvature_mode="cached")
    needed, batch = measured_product(trainer), batch_on_the_device(trainer, Stream.UPPER)
    with at_most(0.6 * needed), pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.training_step(trainer.model, batch)
    assert "Set a smaller curvature_batch_size" in caught.value.__notes__[0]


@pytest.mark.gpu
def test_half_precision_takes_less_memory(tmp_path):
    full, half = (
        peak_of_a_lower_step(large_trainer(tmp_path, per_device_lower_batch_size=128, **precision))
        for precision in ({}, {"bf16": True})
    )
    assert half < 0.8 * full


# Waiting


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"lower_optim": "lars", "lower_learning_rate": 1.0}], ids=["sgd", "lars"])
def test_no_step_waits_for_the_device(tmp_path, precision, settings):
    """Neither forward, solve, clipping, figures nor optimizer read anything back, once the batch lies on the device
    and the alternation has its curvature. fp16 does: its loss scale must know whether to skip."""
    trainer = large_trainer(tmp_path, per_device_lower_batch_size=32, **precision, **settings)

    def step(batch):
        trainer.training_step(trainer.model, batch)
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    for stream in (Stream.LOWER, Stream.UPPER):
        batches = [batch_on_the_device(trainer, stream, number) for number in range(3)]
        step(batches[0])
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches[1:]:
                step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert trainer.metrics_buffer.pop_averages()["upper/loss"] > 0
