"""The pull of the lower level towards theta_D.

The upper level reaches the lower one only through the force lambda (theta_P - theta_D). Its strength over a run is the
sum over lower steps of (effective step length) x lambda: well below 1, theta_P does not feel theta_D.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers.utils import logging

from ..tensors import fill_missing, norm
from .optimizers import LARS, trust_ratios

logger = logging.get_logger(__name__)

WEAK_PULL = 0.5
GOOD_PULL = 3.0
TYPICAL_PULL = 10.0


class Pull:
    """Adds up the pull of a run, on the device."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros((), dtype=torch.float64)
        self._before: Tensor = torch.zeros((), dtype=torch.float64)

    def begin_alternation(self) -> None:
        """Starts to count an alternation."""
        self._before = self.total

    def of_alternation(self) -> float:
        """Returns the pull of the lower steps since the beginning of this alternation. Waits for the device."""
        return float(self.total - self._before.to(self.total.device))

    @torch.no_grad()
    def count(
        self, optimizer: Optimizer, theta_p: Sequence[Tensor], clipped: Tensor, *, proximal_weight: float
    ) -> None:
        """Adds one lower step, from the gradients that it is about to use. They, the proximal force among them, have
        been scaled by the factor `clipped`. Nothing is added for an optimizer of unknown step length.

        Args:
            optimizer (`torch.optim.Optimizer`): of the lower level.
            theta_p (`Sequence[torch.Tensor]`): the backbone's parameters, with their gradients.
            clipped (`torch.Tensor`): factor on the gradients, shape `()`.
            proximal_weight (`float`): lambda in this step.
        """
        if not has_step_length(optimizer):
            return
        length = step_length(optimizer, theta_p, fill_missing([p.grad for p in theta_p], theta_p))
        rate = optimizer.param_groups[0]["lr"]
        self.total = self.total.to(length.device, non_blocking=True) + rate * proximal_weight * length * clipped

    def state_dict(self) -> dict[str, Any]:
        """Returns the pull so far, and that before this alternation."""
        return {"total": float(self.total), "before": float(self._before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.total = torch.tensor(state["total"], dtype=torch.float64)
        self._before = torch.tensor(state["before"], dtype=torch.float64)


@torch.no_grad()
def estimate_pull(
    optimizer: Optimizer,
    theta_p: Sequence[Tensor],
    gradient: Sequence[Tensor],
    *,
    bound: float,
    learning_rates: float,
) -> float:
    """Estimates the pull of a whole run at lambda = 1, as if the gradient stayed as it is. It is linear in lambda for
    SGD and LARS.

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
    return float(length) * learning_rates


class ProximalWeight:
    """lambda, given or set so that the pull of the whole run will be a target.

    The pull of a lower step is proportional to lambda. An estimate before the first alternation gives the first value;
    where what was measured departs from it, the value is corrected between alternations.

    Args:
        value (`float`, *optional*): lambda, if it is given.
        target (`float`, *optional*): the pull of the run, otherwise.
    """

    # Correct where the run would end at less than 1 / 1.25 or more than 1.25 of the target, so that it ends within
    # 1.5; by at most 4 at once, and by at most 16 in all. Where that is not enough steps are bounded (clipped, or of
    # an optimizer that scales them), and a larger lambda would only drown the pretext gradient.
    _TOLERANCE, _LARGEST_CHANGE, _LARGEST_IN_ALL = 1.25, 4.0, 16.0

    def __init__(self, value: float | None, target: float | None) -> None:
        self.value, self.target = value, target
        self._first = value

    def start(self, pull_at_one: float) -> None:
        """Sets lambda from the estimated pull of a run with lambda = 1.

        Raises:
            `ValueError`: if that is not a number above 0.
        """
        if self.target is None:
            return
        if not 0 < pull_at_one < float("inf"):
            raise ValueError(
                f"target_pull is {self.target}, and the pull of a run with lambda = 1 is estimated at {pull_at_one}, "
                "from which lambda cannot be found. Set proximal_weight instead."
            )
        self.value = self._first = self.target / pull_at_one

    def correct(self, pull: Pull, *, past_rates: float, coming_rates: float) -> None:
        """Corrects lambda at the beginning of an alternation, before the pull begins to count it.

        Args:
            pull ([`Pull`]): of the run; that of its last alternation projects that of the coming ones.
            past_rates, coming_rates (`float`): sum of the learning rates of the lower steps of the last alternation,
                and of all coming ones.
        """
        if self.target is None or self.value is None or self._first is None or not past_rates > 0:
            return
        so_far, coming = float(pull.total), pull.of_alternation() * coming_rates / past_rates
        if not 0 < coming < float("inf"):
            return
        if self.target / self._TOLERANCE <= so_far + coming <= self.target * self._TOLERANCE:
            return
        factor = max(self.target - so_far, 0.0) / coming
        wanted = self.value * min(max(factor, 1 / self._LARGEST_CHANGE), self._LARGEST_CHANGE)
        most = self._first * self._LARGEST_IN_ALL
        self.value = min(max(wanted, self._first / self._LARGEST_IN_ALL), most)
        if wanted > most:
            logger.warning_once(
                f"target_pull is {self.target}, and the run is on its way to {so_far + coming:.2g} although lambda is "
                f"{self._LARGEST_IN_ALL:.0f} times its first value: the steps of the lower level are too short for "
                "theta_P to follow theta_D. Raise lower_learning_rate or lower_max_grad_norm, or lower learning_rate "
                "or target_pull."
            )

    def state_dict(self) -> dict[str, Any]:
        """Returns the present value and the first one."""
        return {"value": self.value, "first": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over a value that was found; one that is given stays."""
        if self.target is not None:
            self.value, self._first = state["value"], state["first"]


def horizon_damping(proximal_weight: float, pull_of_alternation: float) -> float:
    """Returns the damping delta with which the damped solve answers a move of theta_D as the lower steps of an
    alternation do.

    K lower steps of effective length eta along  H (theta_P - theta*) + lambda (theta_P - theta_D)  bring the part of a
    move of theta_D along an eigenvector of eigenvalue h to  lambda / (h + lambda) (1 - (1 - eta (h + lambda))^K), for
    which  lambda / (h + lambda + 1 / (eta K))  stands, up to a common factor: the same for large and for small
    eta K (h + lambda). So delta = 1 / (eta K), and the pull of the alternation is lambda eta K.

    Args:
        proximal_weight (`float`): lambda.
        pull_of_alternation (`float`): lambda eta K.
    """
    return proximal_weight / max(pull_of_alternation, 1e-6)


def warn_about_pull(pull: float, proximal_weight: float) -> None:
    """Warns if the upper level will hardly reach the lower one."""
    logger.info(f"Estimated pull of the whole run: {pull:.3g}.")
    if not pull < GOOD_PULL:
        return
    effect = "will hardly feel" if pull < WEAK_PULL else "will feel weakly"
    bound = WEAK_PULL if pull < WEAK_PULL else GOOD_PULL
    weight = GOOD_PULL * proximal_weight / max(pull, 1e-30)
    logger.warning(
        f"The lower level {effect} the upper one: the pull of the whole run is estimated at {pull:.2g}, below "
        f"{bound}. proximal_weight={weight:.2g} would give about {GOOD_PULL:.0f}; "
        f"target_pull={TYPICAL_PULL:.0f} in place of proximal_weight finds a weight by itself."
    )


def momentum_gain(optimizer: Optimizer) -> float:
    """Returns `1 / (1 - momentum)`: how much further a constant gradient carries with momentum than without."""
    momentum = optimizer.param_groups[0].get("momentum", 0.0)
    return 1.0 / (1.0 - momentum) if momentum < 1 else float("inf")


def clip_factor(size: Tensor, bound: float) -> Tensor:
    """Returns by how much a gradient of norm `size` is scaled to keep to `bound`; 1 where the bound is 0 (none)."""
    return torch.clamp(bound / (size + 1e-6), max=1.0) if bound else torch.ones_like(size)


def has_step_length(optimizer: Optimizer) -> bool:
    """Whether [`step_length`] knows this kind of optimizer."""
    return isinstance(optimizer, LARS | torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW | torch.optim.NAdam)


def step_length(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Returns the effective step length of one step at learning rate 1: by how much an entry moves per unit of
    gradient, averaged over the entries of `parameters`. Counts momentum, the trust ratio of LARS, and the scaling of
    Adam-like optimizers by the size of the gradient; it is 1 for plain SGD.

    Under LARS the mean is geometric: tensors without a gradient (key biases, biases before a norm) have a trust ratio
    of `trust_coefficient / weight_decay`, thousands of times that of the others, and tensors near zero one as much
    smaller; few entries of either kind must not rule it. Tensors that are all zero do not count: their trust ratio is
    1 for the first step, and small ever after.
    Under Adam-like optimizers the mean is harmonic, for entries that hardly have a gradient would make any other one.

    Args:
        optimizer (`torch.optim.Optimizer`): LARS, SGD, Adam, AdamW or NAdam. Only its settings and second moments are
            read.
        parameters (`Sequence[torch.Tensor]`): the tensors of interest.
        gradients (`Sequence[torch.Tensor]`): their gradients; they stand in for second moments not collected yet.

    Returns:
        `torch.Tensor`: shape `()`.

    Raises:
        `ValueError`: for another kind of optimizer.
    """
    if not has_step_length(optimizer):
        raise ValueError(
            f"The effective step length of {type(optimizer).__name__} is not known; it is for LARS, SGD, Adam, AdamW "
            "and NAdam."
        )
    group = optimizer.param_groups[0]
    if isinstance(optimizer, LARS):
        mean = _mean_trust_ratio(group, parameters, gradients)
    elif "betas" in group:
        sizes = [
            (_second_moment(optimizer, p, g).sqrt() + group["eps"]).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        mean = 1.0 / torch.cat(sizes).mean()
    else:
        mean = torch.ones((), device=parameters[0].device)
    return mean * momentum_gain(optimizer)


def _mean_trust_ratio(group: dict[str, Any], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    weights = [parameter.detach() for parameter in parameters]
    updates = torch._foreach_add(list(gradients), weights, alpha=group["weight_decay"])
    ratios = trust_ratios(weights, updates, group["trust_coefficient"])
    sizes = torch.tensor([weight.numel() for weight in weights], dtype=ratios.dtype)
    if group["exclude_bias_and_norm"]:
        excluded = torch.tensor([weight.ndim <= 1 for weight in weights])
        ratios = torch.where(excluded.to(ratios.device, non_blocking=True), 1.0, ratios)
    # A tensor that is all zero has no norm.
    counted = sizes.to(ratios.device, non_blocking=True) * (torch.stack(torch._foreach_norm(weights)) > 0)
    return torch.exp((ratios.log() * counted).sum() / counted.sum().clamp(min=1))


def _second_moment(optimizer: Optimizer, parameter: Tensor, gradient: Tensor) -> Tensor:
    """The bias-corrected mean of squared gradients, or the square of the gradient before the first step."""
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return gradient**2
    return state["exp_avg_sq"] / (1 - optimizer.param_groups[0]["betas"][1] ** float(state["step"]))
