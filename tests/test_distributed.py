"""Two and four processes against one process on the same global batch, in float64."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bissl_hf.distributed import average_flat, copy_from_first, gather_rows, rank, world_size
from bissl_hf.losses import barlow_twins_loss, byol_loss, nt_xent_loss, vicreg_loss

from .processes import run_in_processes

PAIRS, WIDTH, DIM = 8, 5, 3


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, a direction, and the images of both views, the same in each process."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, DIM), (WIDTH, DIM), (PAIRS, WIDTH), (PAIRS, WIDTH)]
    weights, direction, first, second = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return weights, direction, first, second


def derivatives(rows: slice, loss_of_views: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian-vector product in the weights of a small network, from some rows of the batch."""
    weights, direction, first, second = problem()
    weights.requires_grad_()
    loss = loss_of_views(torch.tanh(first[rows] @ weights), torch.tanh(second[rows] @ weights))
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    (product,) = torch.autograd.grad(gradient, weights, direction, retain_graph=True)
    (again,) = torch.autograd.grad(gradient, weights, direction)  # a kept graph serves several products
    torch.testing.assert_close(again, product, rtol=0, atol=0)
    return loss.detach(), gradient.detach(), product


def byol_of_views(first: Tensor, second: Tensor) -> Tensor:
    """The loss of BYOL with a predictor that normalises by the statistics of the global batch."""
    embeddings = torch.stack([first, second], dim=1)
    everything = gather_rows(embeddings)
    predictions = (embeddings - everything.mean(dim=0)) / (everything.var(dim=0, unbiased=False) + 1e-5).sqrt()
    return byol_loss(predictions, embeddings.flip(2))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NT-Xent": partial(nt_xent_loss, temperature=0.5),
    "VICReg": vicreg_loss,
    "Barlow Twins": barlow_twins_loss,
    "BYOL": byol_of_views,
}


def in_process(folder: Path) -> None:
    processes, number = world_size(), rank()
    own = PAIRS // processes
    rows = slice(number * own, (number + 1) * own)
    averaged = {name: average_flat(derivatives(rows, loss)) for name, loss in LOSSES.items()}
    with mock.patch("torch.nn.functional.cross_entropy", wraps=torch.nn.functional.cross_entropy) as rows_of_loss:
        derivatives(rows, LOSSES["NT-Xent"])
    assert rows_of_loss.call_args.args[0].shape == (2 * own, 2 * PAIRS), "each process computes its own rows only"

    columns = torch.arange(6.0).reshape(2, 3).T + 10 * number  # not contiguous
    assert not columns.is_contiguous()
    expected = torch.cat([torch.arange(6.0).reshape(2, 3).T + 10 * other for other in range(processes)])
    torch.testing.assert_close(gather_rows(columns), expected, rtol=0, atol=0)

    mean = (processes - 1) / 2
    coarse, fine = torch.full((2,), number, dtype=torch.bfloat16), torch.full((3, 1), 1.0 + number).double()
    replaced = torch.full((2, 3), 10.0 * number).T
    averages = average_flat([coarse, fine], in_place=[replaced])
    torch.testing.assert_close(averages, (torch.full_like(coarse, mean), torch.full_like(fine, 1 + mean)))
    torch.testing.assert_close(replaced, torch.full((3, 2), 10 * mean))
    assert average_flat([]) == ()

    started = [columns.clone().T, torch.tensor(number)]
    copy_from_first(started, torch.device("cpu"))
    torch.testing.assert_close(started[0], torch.arange(6.0).reshape(2, 3), rtol=0, atol=0)
    assert started[1] == 0
    torch.save((processes, averaged), folder / f"{number}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def averages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Losses and derivatives, averaged over processes, as each process holds them."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(in_process, request.param, folder)
    results = [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(request.param)]
    assert [size for size, _ in results] == [request.param] * request.param
    return [averaged for _, averaged in results]


@pytest.mark.distributed
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_and_its_derivatives_are_those_of_the_global_batch(loss: str, averages: list[dict[str, Any]]) -> None:
    expected = derivatives(slice(None), LOSSES[loss])
    assert all(part.norm() > 1e-2 for part in expected)  # the product is one to speak of
    for averaged in averages:
        for actual, wanted in zip(averaged[loss], expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)
        assert all(map(torch.equal, averaged[loss], averages[0][loss])), "every process gets the same bits"


def test_one_process_is_left_alone() -> None:
    rows, others = torch.rand(3, 2), torch.rand(4)
    assert (world_size(), rank()) == (1, 0)
    assert gather_rows(rows) is rows
    averages = average_flat([rows, others])
    assert averages[0] is rows
    assert averages[1] is others
    copy_from_first([rows], rows.device)
