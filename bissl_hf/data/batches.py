"""Rows of a batch: a dictionary of tensors with one row per example, and whatever else; and their way to a device."""

from itertools import pairwise
from typing import Any

import torch


def batch_rows(inputs: dict[str, Any]) -> int:
    """Returns the number of rows of a batch: the first dimension of its first tensor."""
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.ndim > 0:
            return value.shape[0]
    raise ValueError(
        f"A batch must hold at least one tensor with rows; this one has {', '.join(inputs) or 'nothing'}."
    )


def rows_between(inputs: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """Returns the rows from `start` to before `end` of every tensor of a batch, and the other values as they are."""
    return {
        name: value[start:end] if isinstance(value, torch.Tensor) and value.ndim else value
        for name, value in inputs.items()
    }


def split_rows(inputs: dict[str, Any], part_size: int | None) -> list[tuple[dict[str, Any], float]]:
    """Splits a batch into as few parts of at most `part_size` rows as there can be, each with its share of the batch.
    Rows are dealt out evenly: a last part of one row would have no batch statistics."""
    rows = batch_rows(inputs)
    if part_size is None or part_size >= rows:
        return [(inputs, 1.0)]
    count = -(-rows // part_size)
    bounds = [rows * number // count for number in range(count + 1)]
    return [(rows_between(inputs, start, end), (end - start) / rows) for start, end in pairwise(bounds)]


def copy_without_waiting(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor from the host to a device; to a GPU from pinned memory, so that the host goes on at once."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
