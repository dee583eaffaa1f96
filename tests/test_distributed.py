"""Two and four processes against one process on the same global batch, in float64."""

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from bissl_hf.distributed import average_flat, gather_rows, rank, world_size
from bissl_hf.losses import nt_xent_loss

PAIRS, WIDTH, DIM = 8, 5, 3


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, a direction, and the images of both views, the same in each process."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(WIDTH, DIM), (WIDTH, DIM), (PAIRS, WIDTH), (PAIRS, WIDTH)]
    weights, direction, first, second = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return weights, direction, first, second


def derivatives(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and Hessian-vector product in the weights of a small network, from some rows of the batch."""
    weights, direction, first, second = problem()
    weights.requires_grad_()
    loss = nt_xent_loss(torch.tanh(first[rows] @ weights), torch.tanh(second[rows] @ weights), temperature=0.5)
    (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
    (product,) = torch.autograd.grad(gradient, weights, direction, retain_graph=True)
    (again,) = torch.autograd.grad(gradient, weights, direction)  # a kept graph serves several products
    torch.testing.assert_close(again, product, rtol=0, atol=0)
    return loss.detach(), gradient.detach(), product


def in_process(number: int, processes: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=number, world_size=processes)
    assert (world_size(), rank()) == (processes, number)
    own = PAIRS // processes
    averaged = average_flat(derivatives(slice(number * own, (number + 1) * own)))

    columns = torch.arange(6.0).reshape(2, 3).T + 10 * number  # not contiguous
    assert not columns.is_contiguous()
    expected = torch.cat([torch.arange(6.0).reshape(2, 3).T + 10 * other for other in range(processes)])
    torch.testing.assert_close(gather_rows(columns), expected, rtol=0, atol=0)

    with pytest.raises(ValueError, match="takes a single dtype"):
        average_flat([torch.ones(1), torch.ones(1, dtype=torch.float64)])
    assert average_flat([]) == ()
    torch.save((dist.get_world_size(), averaged), f"{folder}/{number}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_nt_xent_and_its_derivatives_are_those_of_the_global_batch(processes: int, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(in_process, args=(processes, port, str(tmp_path)), nprocs=processes)
    expected = derivatives(slice(None))
    assert expected[2].norm() > 1e-2  # the product is one to speak of
    for number in range(processes):
        size, averaged = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert size == processes
        for actual, wanted in zip(averaged, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12)


def test_one_process_is_left_alone() -> None:
    rows, others = torch.rand(3, 2), torch.rand(4)
    assert (world_size(), rank()) == (1, 0)
    assert gather_rows(rows) is rows
    averages = average_flat([rows, others])
    assert averages[0] is rows
    assert averages[1] is others
