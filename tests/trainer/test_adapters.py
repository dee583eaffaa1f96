"""BiSSL on LoRA adapters: the hypergradient against a dense solve, runs with each kind of solve, a resume."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageClassification

from bissl_hf import BiSSLModel
from bissl_hf.data.alternation import Stream

from ..conftest import TinyImages
from ..models.test_adapters import adapted, disturb
from .trainers import make_trainer, same_tensors

SMALL = {"lower_steps": 2, "upper_steps": 2, "per_device_lower_batch_size": 4, "head_warmup_epochs": 0}


def dense_hypergradient(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """(I + H / (lambda + delta))^-1 of the upper gradient at theta_P, plus gamma times that at theta_D, by a matrix
    that is built row by row from gradients; and the same with H = 0."""
    model, args = trainer.model, trainer.args
    theta = model.backbone_parameters("lower")
    inputs = trainer.streams.read(trainer.streams.key(Stream.CURVATURE))
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        loss = model.lower(**inputs).loss
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, theta, create_graph=True)])
    rows = [torch.autograd.grad(entry, theta, retain_graph=True) for entry in gradient]
    hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    labelled = trainer.streams.read(trainer.streams.key(Stream.UPPER))
    rhs = torch.autograd.grad(model(level="aligned", **labelled).loss, theta)
    direct = torch.autograd.grad(model.upper(**labelled).loss, model.backbone_parameters("upper"))
    flat = torch.cat([part.reshape(-1) for part in rhs])
    system = torch.eye(len(flat), dtype=flat.dtype) + hessian / (args.proximal_weight + args.damping)
    solved = torch.linalg.solve(system, flat)
    direct = args.direct_weight * torch.cat([part.reshape(-1) for part in direct])
    return solved + direct, flat + direct


def test_hypergradient_against_a_dense_solve(tmp_path):
    model = disturb(adapted().double())
    trainer = make_trainer(
        tmp_path, model=model, dtype=torch.float64, **{**SMALL, "solver_max_iterations": 300, "damping": 600.0}
    )
    expected, without_curvature = dense_hypergradient(trainer)
    key = trainer.streams.key(Stream.UPPER)
    trainer.create_optimizer()
    trainer.training_step(trainer.model, {"key": key, "inputs": trainer.streams.sources[Stream.UPPER].read(key)})
    found = torch.cat([p.grad.reshape(-1) for p in model.backbone_parameters("upper")])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert (expected - without_curvature).norm() > 1e-3 * expected.norm()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "cg"},
        {"solver": "identity"},
        {"solver": "mfac"},
        {"solver": "none"},
        {"curvature_kind": "gauss_newton"},
        {"solver": "cg", "bf16": True},
    ],
    ids=lambda settings: ",".join(map(str, settings.values())),
)
def test_a_run_moves_adapters_and_heads_only(tmp_path, settings):
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model, **{**SMALL, **settings})
    trainer.train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in moved if "num_batches" not in name and "running" not in name} == trained
    trainer.save_model(tmp_path / "final")
    exported = AutoModelForImageClassification.from_pretrained(tmp_path / "final").eval()
    batch = TinyImages(3).images.float()
    expected = model.eval()(pixel_values=batch).logits
    atol = 1e-2 if "bf16" in settings else 1e-5  # its forward pass stays in autocast
    torch.testing.assert_close(exported(pixel_values=batch).logits, expected, rtol=0, atol=atol)
    assert BiSSLModel.from_pretrained(tmp_path / "final" / "bilevel").shared_parameter_names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_to_the_bit(tmp_path, dtype):
    """With the frozen backbone in bfloat16 adapters and heads stay in float32."""

    def build(folder, **settings):
        model = adapted()
        if dtype is torch.bfloat16:
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)
        steps = {**SMALL, "save_strategy": "steps", "save_steps": 3, "bf16": dtype is torch.bfloat16}
        return make_trainer(folder, model=model, **{**steps, **settings})

    whole = build(tmp_path / "whole")
    whole.train()
    resumed = build(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
