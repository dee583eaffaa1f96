"""Mixed precision: weights that stay in float32, and the loss scale of fp16, for gradients written by hand as well."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import TrainerCallback

from ..tensors import Vector


class LossScale:
    """Keeps small gradients from vanishing in half precision: losses are multiplied by a large number, and the
    gradients divided by it before they are used. The optimizer skips a step whose gradients overflow, and the number
    shrinks. Without a scaler (in every precision but fp16) nothing is scaled.

    The hypergradient is linear in the upper losses, so the scale passes through the solve unchanged.

    Args:
        find_scaler (`Callable`): returns the scaler of Accelerate, which saves and resumes it, or `None`.
    """

    def __init__(self, find_scaler: Callable[[], GradScaler | None]) -> None:
        self._find_scaler = find_scaler

    @property
    def _scaler(self) -> GradScaler | None:
        return self._find_scaler()

    @property
    def is_active(self) -> bool:
        """Whether there is a scale, and steps may be skipped."""
        return self._scaler is not None

    def __call__(self, tensor: Tensor) -> Tensor:
        """Returns a loss, or something to add to a gradient, scaled."""
        return tensor if self._scaler is None else self._scaler.scale(tensor)

    def remove(self, gradient: Vector) -> Vector:
        """Returns a scaled gradient without its scale. Waits for the device."""
        if self._scaler is None:
            return gradient
        scale = self._scaler.get_scale()
        return tuple(part / scale for part in gradient)

    def overflowed(self, gradient: Sequence[Tensor]) -> bool:
        """Whether a scaled gradient holds numbers that are not finite. Waits for the device where there is a scale;
        without one it does not look."""
        return self._scaler is not None and not torch.stack([g.isfinite().all() for g in gradient]).all().item()

    def step(self, optimizer: Optimizer) -> None:
        """Takes a step along scaled gradients, with an optimizer that Accelerate does not know."""
        if self._scaler is None:
            optimizer.step()
        else:
            self._scaler.step(optimizer)
            self._scaler.update()


class ScheduleFollowsSteps(TrainerCallback):
    """Moves the schedule on in a step that the loss scale skips, where Trainer leaves it behind: a schedule of two
    levels distinguishes them by the step."""

    def on_step_end(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        if lr_scheduler is not None and lr_scheduler.last_epoch < state.global_step:
            with warnings.catch_warnings():
                # torch takes a first step that was skipped for one that was forgotten.
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                lr_scheduler.step()


def check_master_weights(model: nn.Module | None) -> None:
    """Refuses a model whose trainable weights are in half precision, where small updates are lost.

    Raises:
        `ValueError`: with the dtypes.
    """
    trainable = [] if model is None else [p for p in model.parameters() if p.requires_grad]
    dtypes = {str(p.dtype) for p in trainable if p.dtype in (torch.float16, torch.bfloat16)}
    if dtypes:
        raise ValueError(
            f"Trainable weights are in {', '.join(sorted(dtypes))}, where small updates are lost. Load the model with "
            "dtype=torch.float32 (or call .float()) and set bf16=True or fp16=True: the passes are in half precision "
            "then, and the weights stay in float32."
        )
