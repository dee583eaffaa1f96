"""Exchange between processes: a gather with derivatives of either mode, one flat average, a common start."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def _in_group() -> bool:
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if _in_group() else 1


def rank() -> int:
    """Number of this process; 0 without a process group."""
    return dist.get_rank() if _in_group() else 0


@contextmanager
def alone() -> Iterator[None]:
    """Has this process compute as if it were the only one: nothing in this module exchanges anything meanwhile."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


class _GatherRows(torch.autograd.Function):
    """Concatenates the rows of all processes. A row is used by every process, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()  # NCCL takes nothing else, and empty_like would keep the strides
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOwnRows.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _GatherRows.apply(tangent)


class _SumOwnRows(torch.autograd.Function):
    """Sums a tensor over processes and keeps the rows of this one: the transpose of [`_GatherRows`]."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        # gloo has no reduce-scatter for every version of torch in range; the sum is the same.
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _GatherRows.apply(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _SumOwnRows.apply(tangent)


def gather_rows(tensor: Tensor) -> Tensor:
    """Concatenates the rows of all processes, in the order of their ranks. Differentiable twice: the derivatives are
    those of the sum over processes of whatever each of them computes from the result.

    Args:
        tensor (`torch.Tensor`): shape `(rows, ...)`, the same on each process.

    Returns:
        `torch.Tensor`: shape `(processes * rows, ...)`; the tensor itself for one process.
    """
    return tensor if world_size() == 1 else _GatherRows.apply(tensor)


def largest_over_processes(value: int, device: torch.device) -> int:
    """Returns the largest of the processes' values, on each process.

    Args:
        value (`int`)
        device (`torch.device`): on which processes exchange tensors.
    """
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def from_first_process(value: Any) -> Any:
    """Returns the value of the first process on each process; it must be one that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def average_flat(tensors: Sequence[Tensor], *, in_place: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Averages tensors over processes in one all-reduce. Every process gets the same bits.

    Args:
        tensors (`Sequence[torch.Tensor]`): of the same shapes on each process. They travel in the widest of their
            dtypes, at least float32.
        in_place (`Sequence[torch.Tensor]`, *optional*): further tensors, which are replaced by their averages.

    Returns:
        `tuple[torch.Tensor, ...]`: the averages of `tensors`, in their dtypes; the tensors themselves for one process.
    """
    tensors, replaced = tuple(tensors), tuple(in_place)
    together = [tensor.detach() for tensor in (*tensors, *replaced)]
    if world_size() == 1 or not together:
        return tensors
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in together), torch.float32)
    flat = torch.cat([tensor.reshape(-1).to(dtype) for tensor in together])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([tensor.numel() for tensor in together])
    averages = [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, together, strict=True)]
    for tensor, average in zip(together[len(tensors) :], averages[len(tensors) :], strict=True):
        tensor.copy_(average)
    return tuple(averages[: len(tensors)])


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Gives the tensors of every process the values that they have on the first one.

    Args:
        tensors (`Iterable[torch.Tensor]`): of the same shapes and dtypes on each process; changed in place.
        device (`torch.device`): on which processes exchange tensors.
    """
    if world_size() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().to(device, memory_format=torch.contiguous_format, copy=True)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)
