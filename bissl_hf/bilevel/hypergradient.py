"""The curvature of the lower level and the implicit gradient of the upper one. Losses are closures; no Trainer here.

With the lower level stationary in theta_P, phi_P held fixed (paper, section 3 and appendix),

    grad L_P(theta_P, phi_P) + lambda (theta_P - theta_D) = 0,

differentiating in theta_D gives the implicit Jacobian  d theta_P* / d theta_D = (I + H / lambda)^-1,  where
H = d2 L_P / d theta_P^2 leaves the proximal term out. It is symmetric, so the upper level's gradient reaches theta_D
as

    x = (I + H / (lambda + delta))^-1 grad_theta L_D(theta_P, phi_D),   with the damping delta for the solve alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..tensors import Vector, add_scaled
from .curvature import Curvature
from .linear_solve import SolveInfo, SolveStatus, conjugate_gradient
from .recycling import Directions, recycled_conjugate_gradient

SOLVERS: tuple[str, ...] = ("cg", "recycled", "blockwise_cg", "identity")


def implicit_gradient(
    curvature: Callable[[Vector], Vector],
    rhs: Sequence[Tensor],
    *,
    proximal_weight: float,
    damping: float,
    max_iterations: int,
    tolerance: float = 0.0,
    solver: str = "cg",
    directions: Directions | None = None,
) -> tuple[Vector, SolveInfo]:
    """Solves `(I + H / (proximal_weight + damping)) x = rhs`.

    Args:
        curvature (`Callable`): gives H times a vector; usually a [`Curvature`].
        rhs (`Sequence[torch.Tensor]`): grad_theta L_D(theta_P, phi_D), already averaged over processes.
        proximal_weight (`float`): lambda, above 0.
        damping (`float`): delta, at least 0.
        max_iterations (`int`): largest number of products.
        tolerance (`float`, *optional*, defaults to 0.0): bound on the relative residual at which to stop.
        solver (`str`, *optional*, defaults to `"cg"`): `"cg"`, `"recycled"` (goes on from earlier solves with the same
            curvature), `"blockwise_cg"` (the authors' published variant) or `"identity"` (`x = rhs`: the implicit
            Jacobian is left out; no product is taken and the residual is not known).
        directions ([`Directions`], *optional*): what `"recycled"` learns; one for all solves with a curvature.

    Returns:
        `tuple[tuple[torch.Tensor, ...], SolveInfo]`: x and an account of the solve.

    Raises:
        `ValueError`: for an unknown solver, weights out of their range, or `"recycled"` without directions.
        `RuntimeError`: if the directions belong to another curvature or other weights.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}.")
    if not proximal_weight > 0:
        raise ValueError(f"proximal_weight is {proximal_weight}; it must be above 0.")
    if not damping >= 0:
        raise ValueError(f"damping is {damping}; it must be at least 0.")
    if not rhs:
        raise ValueError("rhs is empty; a right-hand side of at least one tensor is needed.")
    if solver == "identity":
        return tuple(rhs), _unmeasured(rhs[0].device)

    def matvec(vector: Vector) -> Vector:
        return add_scaled(vector, curvature(vector), 1.0 / (proximal_weight + damping))

    if solver == "recycled":
        if directions is None:
            raise ValueError("solver is 'recycled' and directions is missing; pass one Directions per curvature.")
        if isinstance(curvature, Curvature):
            curvature.check_unchanged()  # a solve that finds its solution among the directions takes no product
        directions.bind(curvature, proximal_weight + damping)
        return recycled_conjugate_gradient(matvec, rhs, directions, max_iterations=max_iterations, tolerance=tolerance)
    return conjugate_gradient(
        matvec, rhs, max_iterations=max_iterations, tolerance=tolerance, blockwise=solver == "blockwise_cg"
    )


def _unmeasured(device: torch.device) -> SolveInfo:
    """The account of a solve that took no product."""
    status = list(SolveStatus).index(SolveStatus.ITERATION_LIMIT)
    return SolveInfo(
        iterations_tensor=torch.tensor(0, device=device),
        residual_tensor=torch.tensor(float("nan"), device=device),
        status_tensor=torch.tensor(status, device=device),
    )
