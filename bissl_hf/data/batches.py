"""Rows of a batch: a dictionary of tensors with one row per example, and whatever else."""

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


def split_rows(inputs: dict[str, Any], part_size: int | None) -> list[tuple[dict[str, Any], float]]:
    """Splits a batch into parts of at most `part_size` rows, each with its share of the batch."""
    rows = batch_rows(inputs)
    if part_size is None or part_size >= rows:
        return [(inputs, 1.0)]
    parts = []
    for start in range(0, rows, part_size):
        part = {
            name: value[start : start + part_size] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in inputs.items()
        }
        parts.append((part, batch_rows(part) / rows))
    return parts
