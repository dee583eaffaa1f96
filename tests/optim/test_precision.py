"""Half precision on a CPU: what stays in float32, how close the gradients are, and what an overflow skips."""

import itertools
import math

import pytest
import torch
from transformers import TrainerCallback

from bissl_hf.bilevel import upper_phase
from bissl_hf.optim.precision import LossScale

from ..conftest import tiny_model, vit_model
from ..trainer.restatement import rate
from ..trainer.trainers import all_equal, everything_of_both_levels, make_trainer, snapshot, training_logs

HALF = [{"bf16": True}, {"fp16": True}]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ids = "-".join


def layer_norm_trainer(output_dir, *, device="cpu", dtype=torch.float32, **settings):
    """A pair on layer norm with weights of a trained size: the batches of a tiny ResNet are too small to be normalised
    in half precision, and so are embeddings near zero."""
    model = vit_model(projection_dims=(5,), dropout=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(20)
    trainer = make_trainer(output_dir, model=model.to(dtype), dtype=dtype, use_cpu=device == "cpu", **settings)
    assert trainer.args.device.type == device
    if trainer.args.fp16:
        # torch's first scale, 65,536, is too large for the gradients of a batch this small.
        trainer.accelerator.scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    return trainer


def gradients_of_both_levels(output_dir, **settings):
    """The gradients that a first lower and a first upper step use, without clipping."""
    found = {}

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for level in ("lower", "upper"):
                grads = [p.grad for p in getattr(model, level).parameters() if p.grad is not None]
                if grads:
                    found[level] = torch.cat([g.double().reshape(-1) for g in grads]).cpu()

    layer_norm_trainer(
        output_dir, num_alternations=1, lower_steps=1, upper_steps=1, lower_learning_rate=1e-12, head_warmup_epochs=0,
        lower_max_grad_norm=0.0, max_grad_norm=0.0, solver_max_iterations=4, callbacks=[Look()],
        **{"damping": 60.0, **settings},
    ).train()  # fmt: skip
    return found


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    found, other = (
        gradients_of_both_levels(tmp_path_factory.mktemp("exact"), dtype=torch.float64, solver=solver)
        for solver in ("cg", "identity")
    )
    effect = (found["upper"] - other["upper"]).norm() / found["upper"].norm()
    assert effect > 0.1, "the curvature must matter"
    return found


@on_each_device
@pytest.mark.parametrize(("precision", "tolerance"), [({}, 1e-4), (HALF[0], 0.05), (HALF[1], 0.01)])
def test_gradients_are_those_of_float64_within_the_precision(tmp_path, exact, precision, tolerance, device):
    """The hypergradient, solve included, and the lower gradient with its proximal force."""
    found = gradients_of_both_levels(tmp_path, device=device, **precision)
    for level in ("lower", "upper"):
        error = float((found[level] - exact[level]).norm() / exact[level].norm())
        assert error < tolerance, level
        assert error > 1e-3 or not precision, "half precision must be on"


@on_each_device
@pytest.mark.parametrize("precision", HALF, ids=ids)
def test_weights_momenta_and_solver_vectors_stay_in_float32(tmp_path, monkeypatch, precision, device):
    dtypes = set()
    solve = upper_phase.implicit_gradient

    def watching(curvature, rhs, **keywords):
        def product(vector):
            image = curvature(vector)
            dtypes.update(tensor.dtype for tensor in (*vector, *image))
            return image

        solution, info = solve(product, rhs, **keywords)
        dtypes.update(tensor.dtype for tensor in (*rhs, *solution))
        return solution, info

    monkeypatch.setattr(upper_phase, "implicit_gradient", watching)
    trainer = make_trainer(tmp_path, num_alternations=1, use_cpu=device == "cpu", **precision)
    trainer.train()
    assert dtypes == {torch.float32}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    for optimizer in (trainer.two_level_optimizer.lower, trainer.two_level_optimizer.upper):
        assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.float32}
    with trainer.accelerator.autocast():
        assert trainer.model.lower.embed(torch.rand(2, 1, 8, 8, device=device)).dtype != torch.float32


def test_the_curvature_is_that_of_float32_under_fp16_and_not_under_bf16(tmp_path):
    """In fp16 its products overflow."""
    products = []
    for precision in ({}, *HALF):
        trainer = layer_norm_trainer(tmp_path, **precision)
        trainer.model.train()
        curvature = trainer.upper_phase.curvature(0)
        products.append(curvature(tuple(torch.ones_like(part) for part in curvature.gradient)))
    full, bf16, fp16 = products
    assert all_equal(full, fp16)
    assert not all_equal(full, bf16)


def test_logged_norms_are_without_the_scale(tmp_path):
    logs = []
    for name, precision in (("full", {}), ("half", {"fp16": True})):
        trainer = layer_norm_trainer(tmp_path / name, num_alternations=1, **precision)
        trainer.train()
        logs.append(training_logs(trainer)[0])
    for name in ("lower/gradient_norm", "upper/gradient_norm", "lower/loss", "upper/loss", "lower/proximal"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05), name
    assert logs[1]["lower/skipped_steps"] == logs[1]["upper/skipped_steps"] == 0.0
    assert "lower/skipped_steps" not in logs[0]


class Overflow(TrainerCallback):
    """Makes the loss scale far too large before some steps, and sensible before the others."""

    def __init__(self, *steps: int) -> None:
        self.steps, self.trainer, self.scales = steps, None, []

    def on_step_begin(self, args, state, control, **kwargs):
        scaler = self.trainer.accelerator.scaler
        if state.global_step in self.steps:
            scaler.update(2.0**60)
        elif state.global_step - 1 in self.steps:
            self.scales.append(scaler.get_scale())
            scaler.update(2.0**10)


def overflowing(output_dir, *steps, device="cpu", **settings):
    overflow = Overflow(*steps)
    trainer = layer_norm_trainer(output_dir, fp16=True, callbacks=[overflow], device=device, **settings)
    overflow.trainer = trainer
    trainer.loss_scale(torch.zeros((), device=device))  # a scale is there from the first use on
    return trainer


@on_each_device
@pytest.mark.parametrize("settings", [{}, {"direct_weight": 0.0}], ids=["direct", "implicit"])
def test_an_overflow_skips_the_step_of_its_level_and_nothing_else(tmp_path, monkeypatch, settings, device):
    """Steps 0 to 2 are lower ones, 3 and 4 upper ones, and so on; the second of each level overflows."""
    solves = []
    solve = upper_phase.implicit_gradient
    monkeypatch.setattr(
        upper_phase, "implicit_gradient", lambda *args, **keywords: solves.append(1) or solve(*args, **keywords)
    )
    trainer = overflowing(tmp_path, 1, 4, device=device, **settings)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(everything_of_both_levels(trainer))

        on_train_end = on_step_begin

        def on_step_end(self, args, state, control, **kwargs):
            assert trainer.lr_scheduler.last_epoch == state.global_step

    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 11
    for step, (before, after) in enumerate(itertools.pairwise(seen)):
        level, other = ("lower", "upper") if step % 5 < 3 else ("upper", "lower")
        assert all_equal(before[other][0] + before[other][1], after[other][0] + after[other][1]), step
        assert all_equal(before[level][0], after[level][0]) == (step in (1, 4)), step
        if step in (1, 4):
            assert all_equal(before[level][1], after[level][1]), "momentum stays as it is"
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    assert len(solves) == 3, "no solve for a right-hand side that overflowed"
    first, second = training_logs(trainer)
    assert first["lower/skipped_steps"] == pytest.approx(1 / 3)
    assert first["upper/skipped_steps"] == pytest.approx(1 / 2)
    assert second["lower/skipped_steps"] == second["upper/skipped_steps"] == 0.0
    assert all(math.isfinite(value) for name, value in first.items() if name != "grad_norm")


def test_the_scale_shrinks_with_an_overflow(tmp_path):
    trainer = overflowing(tmp_path, 1, num_alternations=1)
    trainer.train()
    (overflow,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, Overflow))
    assert overflow.scales == [2.0**59]


def test_a_skipped_step_does_not_shift_the_levels_rates(tmp_path):
    def rates(trainer):
        return {group["level"]: group["lr"] for group in trainer.two_level_optimizer.param_groups}

    found = {}
    for skipped in ((), (0, 3)):
        trainer = overflowing(tmp_path / str(skipped), *skipped)
        found[skipped] = []

        class Look(TrainerCallback):
            def on_step_begin(self, args, state, control, trainer=trainer, seen=found[skipped], **kwargs):
                seen.append(rates(trainer))

        trainer.add_callback(Look())
        trainer.train()
    assert found[()] == found[(0, 3)]
    lower = [seen["lower"] for seen in found[()]]
    expected = [0.05 * rate(min(step % 5, 3) + 3 * (step // 5), 6, 0, 0.001) for step in range(10)]
    assert lower == pytest.approx(expected)


@on_each_device
@pytest.mark.parametrize("precision", HALF, ids=ids)
@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_same_run(tmp_path, precision, step, device):
    """The loss scale too, which an overflow has moved before the checkpoint."""

    def run(name):
        settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "num_alternations": 1}
        if precision == {"fp16": True}:
            return overflowing(tmp_path / name, 0, device=device, **settings)
        return make_trainer(tmp_path / name, use_cpu=device == "cpu", **precision, **settings)

    whole, resumed = run("whole"), run("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-{step}")
    assert all_equal(whole.model.state_dict().values(), resumed.model.state_dict().values())
    if precision == {"fp16": True}:
        assert whole.accelerator.scaler.state_dict() == resumed.accelerator.scaler.state_dict()
        assert whole.accelerator.scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_are_refused(tmp_path, dtype):
    with pytest.raises(ValueError, match=f"Trainable weights are in {dtype}.* dtype=torch.float32 .* bf16=True"):
        make_trainer(tmp_path, model=tiny_model().to(dtype))
    frozen = tiny_model()
    frozen.lower.backbone.embedder.to(dtype).requires_grad_(False)
    frozen.upper.base_model.embedder.to(dtype).requires_grad_(False)
    frozen._shared_names = None
    assert make_trainer(tmp_path, model=frozen)


def test_a_loss_scale_is_nothing_without_a_scaler():
    scale, tensor = LossScale(lambda: None), torch.tensor([float("inf")])
    assert not scale.is_active
    assert scale(tensor) is tensor
    assert scale.remove((tensor,)) == (tensor,)
    assert not scale.overflowed([tensor])


def test_a_loss_scale_scales_what_it_is_given_and_skips_overflows():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scale, parameter = LossScale(lambda: scaler), torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    assert scale(torch.tensor(3.0)).item() == 24.0
    assert all_equal(scale.remove((torch.tensor([8.0, 16.0]),)), (torch.tensor([1.0, 2.0]),))
    parameter.grad = torch.tensor([8.0, 4.0])
    scale.step(optimizer)
    assert torch.equal(parameter.detach(), torch.tensor([0.0, 0.5]))
    parameter.grad = torch.tensor([8.0, float("inf")])
    assert scale.overflowed([parameter.grad])
    assert not scale.overflowed([torch.ones(2)])
    kept = snapshot([parameter])
    scale.step(optimizer)
    assert all_equal(kept, [parameter])
    assert scaler.get_scale() == 4.0
