"""The pull of the lower level towards theta_D.

The upper level reaches the lower one only through the force lambda (theta_P - theta_D). Its strength over a run is the
sum over lower steps of (effective step length) x lambda: well below 1, theta_P does not feel theta_D.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging

from ..tensors import fill_missing, norm
from .optimizer import clip_factor, has_step_length, step_length

logger = logging.get_logger(__name__)

WEAK_PULL = 0.5
GOOD_PULL = 3.0


class Pull:
    """Adds up the pull of a run, on the device.

    Args:
        proximal_weight (`float`): lambda.
    """

    def __init__(self, proximal_weight: float) -> None:
        self.proximal_weight = proximal_weight
        self.total: Tensor = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def count(self, optimizer: Optimizer, theta_p: Sequence[Tensor], clipped: Tensor) -> None:
        """Adds one lower step, from the gradients that it is about to use. They, the proximal force among them, have
        been scaled by the factor `clipped`. Nothing is added for an optimizer of unknown step length."""
        if not has_step_length(optimizer):
            return
        length = step_length(optimizer, theta_p, fill_missing([p.grad for p in theta_p], theta_p))
        rate = optimizer.param_groups[0]["lr"]
        self.total = self.total.to(length.device, non_blocking=True) + rate * self.proximal_weight * length * clipped

    @torch.no_grad()
    def estimate(
        self,
        optimizer: Optimizer,
        theta_p: Sequence[Tensor],
        gradient: Sequence[Tensor],
        *,
        bound: float,
        learning_rates: float,
    ) -> float:
        """Estimates the pull of a whole run as if the gradient stayed as it is.

        Args:
            optimizer (`torch.optim.Optimizer`): of the lower level.
            theta_p (`Sequence[torch.Tensor]`): the backbone's parameters.
            gradient (`Sequence[torch.Tensor]`): of all lower parameters, the backbone's first.
            bound (`float`): on the gradient norm; 0 for none.
            learning_rates (`float`): sum of the learning rates of all lower steps.

        Returns:
            `float`: the pull; NaN for an optimizer of unknown step length.
        """
        if not has_step_length(optimizer):
            return float("nan")
        clipped = clip_factor(norm(gradient), bound)
        length = step_length(optimizer, theta_p, [clipped * g for g in gradient[: len(theta_p)]]) * clipped
        return float(length) * learning_rates * self.proximal_weight


def warn_about_pull(pull: float, proximal_weight: float) -> None:
    """Warns if the upper level will hardly reach the lower one."""
    logger.info(f"Estimated pull of the whole run: {pull:.3g}.")
    if pull < WEAK_PULL:
        logger.warning(
            "The lower level will hardly feel the upper one: the pull of the whole run is estimated at "
            f"{pull:.2g}, below {WEAK_PULL}. proximal_weight={GOOD_PULL * proximal_weight / max(pull, 1e-30):.2g} "
            f"would give about {GOOD_PULL:.0f}."
        )
