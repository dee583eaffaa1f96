"""Batch-norm statistics estimated anew."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norm_modules(model: nn.Module) -> list[_BatchNorm]:
    """Returns the batch-norm layers that keep running statistics."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model has batch-norm layers that keep running statistics."""
    return bool(batch_norm_modules(model))


def check_rows_for_batch_norm(model: nn.Module, rows: int, part_size: int | None = None, *, what: str) -> None:
    """Refuses passes over a single row, which has no batch statistics.

    Args:
        model (`torch.nn.Module`): what the rows pass through in training mode.
        rows (`int`): rows of a batch on one process.
        part_size (`int`, *optional*): rows of a part in which the batch is taken; see [`~data.batches.split_rows`].
        what (`str`): names the batch and the arguments that set its size, for the message.

    Raises:
        `ValueError`: if the model has batch norm and a part has one row.
    """
    parts = -(-rows // min(part_size or rows, rows))
    if rows // parts == 1 and has_batch_norm(model):
        split = f" in {parts} parts, of which the smallest has one row" if parts > 1 else ""
        raise ValueError(
            f"{what}: batch norm would have no statistics, since a process takes a batch of {rows} "
            f"row{'s' if rows > 1 else ''}{split}. Choose sizes that leave at least two rows to each."
        )


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Returns the running means and variances of all batch-norm layers of a model, the tensors themselves."""
    layers = batch_norm_modules(model)
    return [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var) if tensor is not None]


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[dict[str, Any]]) -> None:
    """Replaces the running statistics of a model by their cumulative average over batches. Labels are not used,
    dropout is off, and the modes and momenta of all layers are as before when it returns.

    Args:
        model (`torch.nn.Module`): changed in place.
        batches (`Iterable[dict]`): inputs of `model`, on its device; of equal size if each is to count alike.

    Raises:
        `ValueError`: if there is no batch.
    """
    layers = batch_norm_modules(model)
    if not layers:
        return
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        raise ValueError("There is no batch to estimate batch-norm statistics from; pass at least one.")
    modes = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    try:
        model.eval()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a cumulative average
            layer.train()
        for batch in chain([first], batches):
            model(**{name: value for name, value in batch.items() if name not in ("labels", "label", "label_ids")})
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
