"""Losses of pretext tasks and their gradients against loops in numpy."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bissl_hf.losses import barlow_twins_loss, byol_loss, byol_loss_of_unit_vectors, nt_xent_loss, vicreg_loss


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


@pytest.mark.parametrize("temperature", [0.0, -0.5, float("nan"), float("inf")])
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


# Losses of batch statistics, and BYOL's


def looped_vicreg(
    first: np.ndarray, second: np.ndarray, weights: tuple[float, float, float] = (25.0, 25.0, 1.0)
) -> tuple[float, np.ndarray, np.ndarray]:
    """Algorithm 1 of the VICReg paper, one number at a time, and its gradient in both views."""
    rows, dim = first.shape
    gradients = [np.zeros_like(first), np.zeros_like(second)]
    loss = 0.0
    for i in range(rows):
        for j in range(dim):
            difference = first[i, j] - second[i, j]
            loss += weights[0] * difference**2 / (rows * dim)
            gradients[0][i, j] += weights[0] * 2 * difference / (rows * dim)
            gradients[1][i, j] -= weights[0] * 2 * difference / (rows * dim)
    for view, gradient in zip((first, second), gradients, strict=True):
        means = [sum(view[:, j]) / rows for j in range(dim)]
        centred = np.array([[view[i, j] - means[j] for j in range(dim)] for i in range(rows)])
        covariance = np.array(
            [[sum(centred[:, a] * centred[:, b]) / (rows - 1) for b in range(dim)] for a in range(dim)]
        )
        for j in range(dim):
            deviation = math.sqrt(covariance[j, j] + 1e-4)
            loss += weights[1] * max(0.0, 1 - deviation) / dim
            for i in range(rows):
                if deviation < 1:
                    gradient[i, j] -= weights[1] * centred[i, j] / ((rows - 1) * deviation * dim)
                for b in range(dim):
                    if b != j:
                        gradient[i, j] += weights[2] * 4 * covariance[j, b] * centred[i, b] / ((rows - 1) * dim)
            loss += weights[2] * sum(covariance[j, b] ** 2 for b in range(dim) if b != j) / dim
    return loss, gradients[0], gradients[1]


def looped_barlow_twins(
    first: np.ndarray, second: np.ndarray, weight: float = 0.0051
) -> tuple[float, np.ndarray, np.ndarray]:
    """Equations 1 and 2 of the Barlow Twins paper, one entry of the correlation at a time, and the gradient."""
    rows, dim = first.shape
    centred, scales, normalised = [], [], []
    for view in (first, second):
        centred.append(np.stack([row - sum(view) / rows for row in view]))
        scales.append([math.sqrt(sum(c**2 for c in centred[-1][:, j]) / rows + 1e-5) for j in range(dim)])
        normalised.append(np.stack([centred[-1][:, j] / scales[-1][j] for j in range(dim)], axis=1))
    loss, outer = 0.0, np.zeros((dim, dim))  # and the derivative of the loss in the correlation
    for i in range(dim):
        for j in range(dim):
            correlation = sum(normalised[0][:, i] * normalised[1][:, j]) / rows
            loss += (1 - correlation) ** 2 if i == j else weight * correlation**2
            outer[i, j] = -2 * (1 - correlation) if i == j else 2 * weight * correlation
    gradients = []
    for side, (other, slopes) in enumerate(((normalised[1], outer), (normalised[0], outer.T))):
        gradient = np.zeros_like(first)
        for j in range(dim):
            inner = sum(slopes[j, b] * other[:, b] for b in range(dim)) / rows  # in the normalised column
            shrink = sum(inner * normalised[side][:, j]) / rows
            column = (inner - shrink * normalised[side][:, j]) / scales[side][j]  # in the centred column
            gradient[:, j] = column - sum(column) / rows
        gradients.append(gradient)
    return loss, gradients[0], gradients[1]


def looped_byol(
    first: np.ndarray, second: np.ndarray, targets: tuple[np.ndarray, np.ndarray]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Equation 2 of the BYOL paper for each prediction with the target of the other view, and the gradient."""
    loss, gradients = 0.0, []
    for predictions, constants in zip((first, second), (targets[1], targets[0]), strict=True):
        gradient = np.zeros_like(predictions)
        for i, (prediction, target) in enumerate(zip(predictions, constants, strict=True)):
            length, unit = np.linalg.norm(prediction), target / np.linalg.norm(target)
            cosine = prediction @ unit / length
            loss += (2 - 2 * cosine) / (2 * len(first))
            gradient[i] = -2 * (unit - cosine * prediction / length) / length / (2 * len(first))
        gradients.append(gradient)
    return loss, gradients[0], gradients[1]


TARGETS = views(seed=3)


def byol(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return byol_loss(torch.stack([first, second], dim=1), torch.stack(TARGETS, dim=1))


LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., tuple[float, np.ndarray, np.ndarray]]]] = {
    "vicreg": (vicreg_loss, looped_vicreg),
    "barlow_twins": (barlow_twins_loss, looped_barlow_twins),
    "byol": (byol, lambda a, b: looped_byol(a, b, (TARGETS[0].numpy(), TARGETS[1].numpy()))),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_loss_and_gradient_equal_the_loops(name: str, scale: float) -> None:
    loss_fn, looped = LOSSES[name]
    first, second = (scale * view for view in views(seed=1))
    expected = looped(first.numpy(), second.numpy())
    loss = loss_fn(first.requires_grad_(), second.requires_grad_())
    gradients = torch.autograd.grad(loss, (first, second))
    assert loss.item() == pytest.approx(expected[0], rel=1e-12)
    for gradient, wanted in zip(gradients, expected[1:], strict=True):
        torch.testing.assert_close(gradient, torch.from_numpy(wanted), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_hessian_vector_product_equals_finite_differences_of_the_looped_gradient(name: str) -> None:
    loss_fn, looped = LOSSES[name]
    first, second = views(seed=1)
    along = views(seed=2)
    step = 1e-6
    ahead, behind = (
        looped(*((view + sign * step * v).numpy() for view, v in zip((first, second), along, strict=True)))[1:]
        for sign in (1, -1)
    )
    points = (first.requires_grad_(), second.requires_grad_())
    gradients = torch.autograd.grad(loss_fn(*points), points, create_graph=True)
    products = torch.autograd.grad(gradients, points, along)
    for product, plus, minus in zip(products, ahead, behind, strict=True):
        wanted = torch.from_numpy((plus - minus) / (2 * step))
        assert wanted.norm() > 1e-2
        torch.testing.assert_close(product, wanted, rtol=1e-6, atol=1e-7)


def test_weights_of_the_terms() -> None:
    first, second = views(seed=1)
    for weights in [(1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 3.0)]:
        names = ("invariance_weight", "variance_weight", "covariance_weight")
        loss = vicreg_loss(0.3 * first, 0.3 * second, **dict(zip(names, weights, strict=True)))
        expected = looped_vicreg(0.3 * first.numpy(), 0.3 * second.numpy(), weights)[0]
        assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss = barlow_twins_loss(first, second, redundancy_weight=0.3)
    assert loss.item() == pytest.approx(looped_barlow_twins(first.numpy(), second.numpy(), 0.3)[0], rel=1e-12)


def test_the_targets_of_byol_are_constants_of_the_other_view() -> None:
    predictions = torch.stack(views(seed=1), dim=1).requires_grad_()
    targets = torch.stack(TARGETS, dim=1).requires_grad_()
    _, gradient = torch.autograd.grad(byol_loss(predictions, targets), (predictions, targets), allow_unused=True)
    assert gradient is None
    aligned = byol_loss(predictions, 2 * predictions.flip(1))
    assert aligned.item() == pytest.approx(0, abs=1e-14)


def test_the_form_of_byol_in_unit_vectors_is_convex_and_the_same() -> None:
    both = [torch.nn.functional.normalize(torch.stack(pair, dim=1), dim=2) for pair in (views(2, 3), views(2, 3, 4))]
    assert byol_loss_of_unit_vectors(*both).item() == pytest.approx(byol_loss(*both).item(), rel=1e-13)
    points = torch.stack(both)
    hessian = torch.autograd.functional.hessian(lambda x: byol_loss_of_unit_vectors(*x), points)
    eigenvalues = torch.linalg.eigvalsh(hessian.reshape(points.numel(), points.numel()))
    assert eigenvalues.min() > -1e-12
    assert eigenvalues.max() == pytest.approx(1.0)  # 2 (1 / (2 images)) (1 + 1)


@pytest.mark.parametrize("loss_fn", [vicreg_loss, barlow_twins_loss])
def test_losses_of_statistics_refuse_what_does_not_fit(loss_fn: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"shapes \(4, 3\) and \(3, 3\); both must be \(batch, dim\)"):
        loss_fn(torch.ones(4, 3), torch.ones(3, 3))
    for rows in (0, 1):
        with pytest.raises(ValueError, match=f"global batch has {rows} pair; statistics over a batch need at least 2"):
            loss_fn(torch.ones(rows, 3), torch.ones(rows, 3))


@pytest.mark.parametrize("shapes", [((4, 2, 3), (4, 2, 2)), ((4, 3, 3), (4, 3, 3)), ((4, 3), (4, 3))])
def test_byol_refuses_shapes_that_do_not_fit(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"both must be \(batch, 2, dim\)"):
        byol_loss(torch.ones(shapes[0]), torch.ones(shapes[1]))


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_give_a_loss_in_single_precision(name: str) -> None:
    first, second = (torch.randn(5, 4).bfloat16() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = LOSSES[name][0](first, second)
    if name != "byol":
        assert torch.equal(loss, LOSSES[name][0](first.float(), second.float()))
    assert loss.dtype == (torch.float64 if name == "byol" else torch.float32)  # the targets above are in float64


def test_constant_columns_give_finite_derivatives() -> None:
    """What has collapsed must be able to come apart again."""
    for loss_fn in (vicreg_loss, barlow_twins_loss):
        first, second = (torch.ones(4, 3).requires_grad_() for _ in range(2))
        gradients = torch.autograd.grad(loss_fn(first, second), (first, second))
        assert all(gradient.isfinite().all() for gradient in gradients)


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
