"""Weights that are not finite: found where a model is loaded and before one is written."""

from typing import TypeVar

import torch
from torch import nn

ModelType = TypeVar("ModelType", bound=nn.Module)


def not_finite_weights(model: nn.Module) -> list[str]:
    """Returns the names of what a checkpoint of the model would hold (parameters and running statistics) with NaN or
    infinity in it. Waits for the device once, and once more if there are any."""
    named = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    if not named:
        return []
    device = next(iter(named.values())).device
    finite = torch.stack([value.isfinite().all().to(device) for value in named.values()])
    return [name for name, is_finite in zip(named, finite.tolist(), strict=True) if not is_finite]


def with_finite_weights(model: ModelType, source: object) -> ModelType:
    """Returns a model that was loaded.

    Args:
        model (`torch.nn.Module`)
        source (`object`): where it comes from, for the message.

    Raises:
        `ValueError`: if it has weights that are not finite, with their names.
    """
    check_finite_weights(model, f"{source} holds a model that has diverged; choose another checkpoint")
    return model


def check_finite_weights(model: nn.Module, reason: str) -> None:
    """Refuses a model with weights that are not finite.

    Args:
        model (`torch.nn.Module`)
        reason (`str`): how the message goes on.

    Raises:
        `ValueError`: with the names of the weights.
    """
    if damaged := not_finite_weights(model):
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        raise ValueError(f"{', '.join(damaged[:3])}{more} hold NaN or infinity: {reason}.")
