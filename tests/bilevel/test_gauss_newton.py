"""Gauss-Newton products against dense J and S, in float64."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bissl_hf import SimCLRConfig, SimCLRForPreTraining
from bissl_hf.bilevel.curvature import Curvature
from bissl_hf.bilevel.gauss_newton import GaussNewton
from bissl_hf.distributed import average_flat, rank, world_size
from bissl_hf.losses import nt_xent_from_similarities, nt_xent_loss, pair_similarities

from ..processes import run_in_processes

ROWS, WIDTH, DIM = 8, 5, 3


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, DIM, bias=False))
    return nn.Sequential(*layers).double()


def views() -> Tensor:
    return torch.randn(ROWS, 2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def similarities(embeddings: Tensor) -> Tensor:
    return pair_similarities(*embeddings.unbind(1), temperature=0.5)


def contrastive(model: nn.Module, x: Tensor, size: int = ROWS, **settings: Any) -> GaussNewton:
    parts = [lambda part=part: model(part) for part in x.split(size)]
    return GaussNewton(parts, nt_xent_from_similarities, list(model.parameters()), join=similarities, **settings)


def direction(parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in parameters)


def flat(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in vector])


def dense(
    outputs_fn: Callable[[], Tensor], loss_fn: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> Tensor:
    """J' S J from all rows of J and S, each by a backward pass; infinite outputs are constants."""
    outputs = outputs_fn()
    finite = outputs.isfinite()
    rows = [flat(torch.autograd.grad(o, parameters, retain_graph=True)) for o in outputs[finite]]
    jacobian = torch.stack(rows)
    values = outputs.detach()
    hessian = torch.autograd.functional.hessian(
        lambda entries: loss_fn(values.masked_scatter(finite, entries)), values[finite]
    )
    return jacobian.T @ hessian @ jacobian


def as_matrix(curvature: Curvature) -> Tensor:
    sizes = [parameter.numel() for parameter in curvature.parameters]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = zip(unit.split(sizes), curvature.parameters, strict=True)
        columns.append(flat(curvature([part.view(parameter.shape) for part, parameter in parts])))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("forward_mode", [None, False])
@pytest.mark.parametrize(("size", "mode"), [(ROWS, "cached"), (ROWS, "recompute"), (3, "recompute"), (3, "cached")])
def test_products_are_those_of_dense_factors(size: int, mode: str, forward_mode: bool | None) -> None:
    model = network()
    parameters = list(model.parameters())
    expected = dense(lambda: similarities(model(views())), nt_xent_from_similarities, parameters)
    curvature = contrastive(model, views(), size, mode=mode)
    curvature._forward_mode = forward_mode
    found = as_matrix(curvature)
    assert expected.norm() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert curvature._forward_mode is (forward_mode is None)
    eigenvalues = torch.linalg.eigvalsh((found + found.T) / 2)
    assert eigenvalues.min() > -1e-14 * eigenvalues.max()
    hessian = as_matrix(Curvature(lambda: nt_xent_from_similarities(similarities(model(views()))), parameters))
    assert torch.linalg.eigvalsh((hessian + hessian.T) / 2).min() < -1e-3, "where the Hessian is indefinite"
    gradient = torch.autograd.grad(nt_xent_loss(*model(views()).unbind(1), temperature=0.5), parameters)
    torch.testing.assert_close(flat(curvature.gradient), flat(gradient), rtol=0, atol=1e-12)


def test_it_is_the_hessian_of_a_linear_network() -> None:
    torch.manual_seed(0)
    model, labels = nn.Linear(WIDTH, DIM).double(), torch.arange(ROWS) % DIM
    x, parameters = views()[:, 0], list(model.parameters())
    hessian = Curvature(lambda: F.cross_entropy(model(x), labels), parameters)
    curvature = GaussNewton(lambda: model(x), lambda logits: F.cross_entropy(logits, labels), parameters)
    torch.testing.assert_close(as_matrix(curvature), as_matrix(hessian), rtol=0, atol=1e-12)


def test_a_loss_that_is_linear_in_its_outputs_has_none() -> None:
    model = network()
    curvature = GaussNewton(lambda: model(views()), torch.sum, list(model.parameters()))
    assert not flat(curvature(direction(list(model.parameters())))).any()
    assert flat(curvature.gradient).any()


def test_unused_parameters_have_no_curvature() -> None:
    model = network()
    parameters = [*model.parameters(), torch.zeros(2, dtype=torch.float64, requires_grad=True)]
    curvature = GaussNewton(lambda: model(views()), lambda o: o.square().sum(), parameters)
    product = curvature(direction(parameters))
    assert not product[-1].any()
    assert product[0].any()


@pytest.mark.parametrize(("size", "mode"), [(ROWS, "cached"), (3, "recompute")])
def test_every_pass_draws_the_same_dropout_masks(size: int, mode: str) -> None:
    model, x = network(dropout=0.5), views()
    torch.manual_seed(3)
    curvature = contrastive(model, x, size, mode=mode)
    torch.rand(5)
    found = as_matrix(curvature)
    torch.manual_seed(3)
    masks = torch.cat([F.dropout(torch.ones(len(part), 2, 4, dtype=torch.float64)) for part in x.split(size)])
    assert 0 < float((masks == 0).double().mean()) < 1
    expected = dense(
        lambda: similarities(model[4](model[:3](x) * masks)), nt_xent_from_similarities, curvature.parameters
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def tiny_simclr() -> SimCLRForPreTraining:
    from transformers import ResNetConfig

    torch.manual_seed(0)
    backbone = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic")
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, projection_dims=(6, 4)))


def test_simclr_offers_its_outputs() -> None:
    """Batch norm and convolutions in forward mode, without moving the running statistics, against two backward
    passes; and the sum of both terms of the Hessian."""
    model = tiny_simclr().double()
    x = torch.rand(5, 2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameters = list(model.backbone.parameters())
    torch.testing.assert_close(model.loss_from_outputs(model.outputs_for_loss(pixel_values=x)), model(x).loss)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def rows() -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, buffers, kwargs={"pixel_values": x, "return_loss": False}).embeddings

    products = []
    for forward_mode in (None, False):
        curvature = GaussNewton(rows, model.loss_from_outputs, parameters, join=model.outputs_from_embeddings)
        curvature._forward_mode = forward_mode
        products.append(flat(curvature(direction(parameters))))
    assert products[0].norm() > 1e-3
    torch.testing.assert_close(*products, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_half_precision() -> None:
    model = tiny_simclr()
    x = torch.rand(8, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    parameters = list(model.backbone.parameters())
    products = []
    for enabled in (True, False):

        def rows(enabled: bool = enabled) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                return model(x, return_loss=False).embeddings.float()

        curvature = GaussNewton(rows, model.loss_from_outputs, parameters, join=model.outputs_from_embeddings)
        products.append(flat(curvature(direction(parameters))))
        assert curvature._forward_mode
    assert (products[0] - products[1]).norm() < 0.2 * products[1].norm()


class _NoForwardRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class _PastTorchsFunctions(torch.autograd.Function):
    """Takes a parameter without a function of torch that could see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum(0)

    @staticmethod
    def jvp(ctx: Any, x: Tensor | None, weight: Tensor | None) -> Tensor | None:
        return x


@pytest.mark.parametrize("function", [_NoForwardRule.apply, None])
def test_operators_without_forward_rule_are_differentiated_twice(
    function: Callable[[Tensor], Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("bissl_hf.bilevel.gauss_newton.logger.warning_once", told.append)
    weight = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = views()[:, 0]

    def outputs() -> Tensor:
        return function(x * weight) if function else _PastTorchsFunctions.apply(x, weight).sin()

    curvature = GaussNewton(outputs, lambda o: o.pow(4).sum(), [weight])
    found = as_matrix(curvature)
    jacobian = (x * (x * weight).cos()).detach()  # of o_ij in weight_j
    second = 12 * (x * weight).detach().sin().square()
    torch.testing.assert_close(found, (second * jacobian.square()).sum(0).diag(), rtol=0, atol=1e-10)
    assert curvature._forward_mode is False
    assert len(told) == 1
    assert "without forward-mode differentiation" in told[0]


def test_no_graph_of_second_derivatives_is_held() -> None:
    """What autograd keeps for a product is what a forward pass keeps: the peak is that of a gradient."""
    model = network()
    parameters = list(model.parameters())
    peaks = []
    for take in ("gradient", "product"):
        held, peak = 0, 0

        class Held:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal held, peak
                self.tensor, self.bytes = tensor, tensor.numel() * tensor.element_size()
                held += self.bytes
                peak = max(peak, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
            curvature = GaussNewton(lambda: model(views()), lambda o: o.square().sum(), parameters)
            flat(curvature.gradient)
            if take == "product":
                curvature(direction(parameters))
                curvature(direction(parameters))
        peaks.append(peak)
        del curvature
    assert peaks[1] <= 1.01 * peaks[0]
    assert peaks[0] > 0


def test_changed_parameters_are_noticed() -> None:
    model = network()
    curvature = contrastive(model, views())
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="The parameters have changed"):
        curvature(direction(curvature.parameters))


def test_bad_arguments_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="mode is 'sometimes'"):
        contrastive(model, views(), mode="sometimes")
    with pytest.raises(ValueError, match="parameters is empty"):
        GaussNewton(lambda: model(views()), torch.sum, [])
    with pytest.raises(ValueError, match="views have shapes"):
        pair_similarities(torch.ones(2, 3), torch.ones(3, 3), temperature=0.5)


def in_process(folder: Path) -> None:
    model = network()
    own = views().chunk(world_size())[rank()]
    found = {}
    for size, mode in ((ROWS, "cached"), (3, "recompute")):
        for forward_mode in (None, False):
            curvature = contrastive(model, own, size, mode=mode, reduce=average_flat)
            curvature._forward_mode = forward_mode
            found[f"{size} {forward_mode}"] = (*curvature(direction(curvature.parameters)), *curvature.gradient)
            assert curvature._forward_mode is (forward_mode is None)
    torch.save((world_size(), found), folder / f"{rank()}.pt")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_products_of_the_global_batch(tmp_path: Path) -> None:
    run_in_processes(in_process, 2, tmp_path)
    whole = contrastive(network(), views())
    expected = flat((*whole(direction(whole.parameters)), *whole.gradient))
    for number in range(2):
        size, found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert size == 2
        for parts in found.values():
            torch.testing.assert_close(flat(parts), expected, rtol=0, atol=1e-12)
