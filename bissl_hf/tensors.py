"""Arithmetic on vectors that are tuples of tensors, one tensor per parameter, in parameter order."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Vector = tuple[Tensor, ...]


def check_same_structure(first: Sequence[Tensor], second: Sequence[Tensor], *, names: tuple[str, str]) -> None:
    """Raises a `ValueError` unless both vectors have the same number of tensors with the same shapes."""
    if len(first) != len(second):
        raise ValueError(f"{names[0]} has {len(first)} tensors and {names[1]} has {len(second)}; they must agree.")
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.shape != b.shape:
            raise ValueError(
                f"Tensor {index} has shape {tuple(a.shape)} in {names[0]} and {tuple(b.shape)} in {names[1]}; they "
                "must agree."
            )


def is_finite(vector: Sequence[Tensor]) -> bool:
    """Whether all numbers of a vector are finite. Waits for the device."""
    return bool(torch.stack([part.isfinite().all() for part in vector]).all())


def add_scaled(x: Sequence[Tensor], y: Sequence[Tensor], scale: float) -> Vector:
    """Returns `x + scale * y`."""
    return tuple(torch._foreach_add(list(x), list(y), alpha=scale))


def accumulate(total: Vector, part: Sequence[Tensor]) -> None:
    """Adds a vector to `total`, in place."""
    torch._foreach_add_(list(total), list(part))


def subtract(x: Sequence[Tensor], y: Sequence[Tensor]) -> Vector:
    """Returns `x - y`."""
    return tuple(torch._foreach_sub(list(x), list(y)))


def block_dots(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Returns the inner product of each pair of tensors, shape `(number of tensors,)`."""
    return torch.stack([torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(x, y, strict=True)])


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Returns the inner product of two vectors, a tensor of shape `()`."""
    return block_dots(x, y).sum()


def norm(x: Sequence[Tensor]) -> Tensor:
    """Returns the Euclidean norm of a vector, a tensor of shape `()`. Entries whose squares overflow or vanish in
    their precision are not rescaled."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(x))))


def cosine(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """Returns the cosine of the angle between two vectors, a tensor of shape `()`; 0 where one of them is zero or not
    finite, and so has no direction."""
    first, second = ([tensor / _largest_entry(vector) for tensor in vector] for vector in (x, y))
    value = dot(first, second) / (norm(first) * norm(second))
    return torch.where(torch.isfinite(value), value, 0.0).clamp(-1.0, 1.0)


def _largest_entry(x: Sequence[Tensor]) -> Tensor:
    """Largest absolute entry, a tensor of shape `()`. Divided by it, no vector is so short or long that its squares
    vanish or overflow."""
    return torch.stack([tensor.abs().max() for tensor in x if tensor.numel()]).max()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns a tensor of half precision in float32, and any other as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def fill_missing(tensors: Iterable[Tensor | None], like: Sequence[Tensor]) -> Vector:
    """Replaces each `None` by zeros of the shape of its neighbour in `like`."""
    return tuple(
        torch.zeros_like(reference) if tensor is None else tensor
        for tensor, reference in zip(tensors, like, strict=True)
    )
