"""NT-Xent against a double loop in numpy."""

import math

import numpy as np
import pytest
import torch

from bissl_hf.losses import nt_xent_loss


def looped_nt_xent(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """Equation 1 of the SimCLR paper, one pair of embeddings at a time."""
    rows = [*first, *second]
    pairs = len(first)

    def similarity(i: int, k: int) -> float:
        return float(rows[i] @ rows[k] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[k])) / temperature)

    total = 0.0
    for i in range(2 * pairs):
        positive = (i + pairs) % (2 * pairs)
        denominator = sum(math.exp(similarity(i, k)) for k in range(2 * pairs) if k != i)
        total -= math.log(math.exp(similarity(i, positive)) / denominator)
    return total / (2 * pairs)


def views(rows: int = 5, dim: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    return first, first + 0.5 * torch.randn(rows, dim, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_equals_the_double_loop(rows: int, temperature: float) -> None:
    first, second = views(rows)
    expected = looped_nt_xent(first.numpy(), second.numpy(), temperature)
    assert nt_xent_loss(first, second, temperature=temperature).item() == pytest.approx(expected, abs=1e-13)


def test_is_symmetric_in_the_views_and_blind_to_lengths() -> None:
    first, second = views()
    loss = nt_xent_loss(first, second, temperature=0.5)
    torch.testing.assert_close(nt_xent_loss(second, first, temperature=0.5), loss, rtol=0, atol=1e-14)
    scales = torch.arange(1, 6, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        nt_xent_loss(first * scales, second / scales, temperature=0.5), loss, rtol=0, atol=1e-14
    )


def test_first_and_second_derivatives() -> None:
    first, second = (view.requires_grad_() for view in views(3, 3))
    assert torch.autograd.gradcheck(lambda a, b: nt_xent_loss(a, b, temperature=0.5), (first, second))
    assert torch.autograd.gradgradcheck(lambda a, b: nt_xent_loss(a, b, temperature=0.5), (first, second))


@pytest.mark.parametrize("shapes", [((4, 3), (3, 3)), ((4, 3), (4, 2)), ((4, 3, 1), (4, 3, 1)), ((4,), (4,))])
def test_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"both must be \(batch, dim\)"):
        nt_xent_loss(torch.ones(shapes[0]), torch.ones(shapes[1]), temperature=0.5)


@pytest.mark.parametrize("temperature", [0.0, -0.5, float("nan")])
def test_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        nt_xent_loss(*views(), temperature=temperature)


@pytest.mark.parametrize("rows", [0, 1])
def test_refuses_a_batch_without_negatives(rows: int) -> None:
    with pytest.raises(ValueError, match=f"global batch has {rows} pair"):
        nt_xent_loss(*views(rows), temperature=0.5)


def test_half_precision_embeddings_are_compared_in_single_precision() -> None:
    first, second = torch.randn(4, 8), torch.randn(4, 8)
    halves = first.bfloat16(), second.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent_loss(*halves, temperature=0.5)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, nt_xent_loss(*(half.float() for half in halves), temperature=0.5))


def test_a_zero_embedding_has_the_second_derivative_of_the_closed_form() -> None:
    """Below 1e-12 an embedding is divided by 1e-12: the product is linear in it there."""
    first, second = views(3, 3)
    first[1] = 0.0
    first.requires_grad_()
    vector = torch.zeros_like(first)
    vector[1] = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(nt_xent_loss(first, second, temperature=0.5), first, create_graph=True)
    (product,) = torch.autograd.grad(gradient, first, vector)

    unit = torch.nn.functional.normalize(first.detach(), dim=1)
    others = torch.nn.functional.normalize(second, dim=1)

    def loss_of_row(row: torch.Tensor) -> torch.Tensor:
        rows = torch.cat([unit[:1], row[None], unit[2:], others])
        similarities = (rows @ rows.T / 0.5).masked_fill(torch.eye(6, dtype=torch.bool), float("-inf"))
        return torch.nn.functional.cross_entropy(similarities, torch.arange(6).roll(3))

    dense = torch.func.hessian(loss_of_row)(unit[1]) * 1e24
    torch.testing.assert_close(product[1], dense @ vector[1], rtol=1e-10, atol=0)
    assert torch.isfinite(product).all()
