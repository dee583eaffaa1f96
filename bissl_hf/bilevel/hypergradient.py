"""The curvature of the lower level and the implicit gradient of the upper one. Losses are closures; no Trainer here.

With the lower level stationary in theta_P, phi_P held fixed (paper, section 3 and appendix),

    grad L_P(theta_P, phi_P) + lambda (theta_P - theta_D) = 0,

differentiating in theta_D gives the implicit Jacobian  d theta_P* / d theta_D = (I + H / lambda)^-1,  where
H = d2 L_P / d theta_P^2 leaves the proximal term out. It is symmetric, so the upper level's gradient reaches theta_D
as

    x = (I + H / (lambda + delta))^-1 grad_theta L_D(theta_P, phi_D),   with the damping delta for the solve alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from ..tensors import Vector, add_scaled, fill_missing
from .curvature import Curvature
from .empirical_fisher import EmpiricalFisher
from .linear_solve import SolveInfo, check_solve_arguments, conjugate_gradient
from .recycling import Directions, recycled_conjugate_gradient


class Memory(Protocol):
    """What a solver remembers from one call to the next."""

    def __len__(self) -> int: ...

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class LinearSystem:
    """`A x = rhs` with `A = I + H / shift`, and how to solve it: what every solver is given.

    Args:
        curvature (`Callable`): gives H times a vector; `None` for a solver that takes no product.
        rhs (`tuple[torch.Tensor, ...]`): right-hand side.
        shift (`float`): lambda + delta.
        max_iterations (`int`), tolerance (`float`), memory (`Memory`): see [`implicit_gradient`].
    """

    curvature: Callable[[Vector], Vector] | None
    rhs: Vector
    shift: float
    max_iterations: int
    tolerance: float
    memory: Memory | None

    def __call__(self, vector: Vector) -> Vector:
        """Returns A times a vector."""
        if self.curvature is None:
            raise ValueError("curvature is None and this solver takes products with it; pass a Curvature.")
        return add_scaled(vector, self.curvature(vector), 1.0 / self.shift)


@dataclass(frozen=True)
class Solver:
    """One way to solve the linear system.

    Args:
        solve (`Callable`): from a [`LinearSystem`] to the solution and a [`SolveInfo`].
        second_order (`bool`): whether it takes products with the curvature.
        memory (`type`, *optional*): makes what it remembers, given the number of vectors to keep.
        lasts_a_phase (`bool`, *optional*, defaults to `False`): whether it is forgotten at the end of an upper phase,
            since it belongs to one curvature, rather than kept over the run.
    """

    solve: Callable[[LinearSystem], tuple[Vector, SolveInfo]]
    second_order: bool
    memory: type[Directions] | type[EmpiricalFisher] | None = None
    lasts_a_phase: bool = False


MemoryType = TypeVar("MemoryType", Directions, EmpiricalFisher)


def _memory(system: LinearSystem, kind: type[MemoryType]) -> MemoryType:
    """Returns the memory of a system, if it is of the kind that a solver needs."""
    if not isinstance(system.memory, kind):
        raise TypeError(
            f"memory is of type {type(system.memory).__name__} and this solver needs {kind.__name__}; pass the one of "
            "all its solves."
        )
    return system.memory


def _cg(system: LinearSystem) -> tuple[Vector, SolveInfo]:
    return conjugate_gradient(system, system.rhs, max_iterations=system.max_iterations, tolerance=system.tolerance)


def _blockwise_cg(system: LinearSystem) -> tuple[Vector, SolveInfo]:
    return conjugate_gradient(
        system, system.rhs, max_iterations=system.max_iterations, tolerance=system.tolerance, blockwise=True
    )


def _recycled(system: LinearSystem) -> tuple[Vector, SolveInfo]:
    directions = _memory(system, Directions)
    if isinstance(system.curvature, Curvature):
        system.curvature.check_unchanged()  # a solve that finds its solution among the directions takes no product
    directions.bind(system.curvature, system.shift)
    return recycled_conjugate_gradient(
        system, system.rhs, directions, max_iterations=system.max_iterations, tolerance=system.tolerance
    )


def _mfac(system: LinearSystem) -> tuple[Vector, SolveInfo]:
    solution = _memory(system, EmpiricalFisher).solve(system.rhs, system.shift)
    return solution, SolveInfo.unmeasured(system.rhs[0].device)


def _identity(system: LinearSystem) -> tuple[Vector, SolveInfo]:
    return system.rhs, SolveInfo.unmeasured(system.rhs[0].device)


def _none(system: LinearSystem) -> tuple[Vector, SolveInfo]:
    zero = fill_missing([None] * len(system.rhs), system.rhs)
    return zero, SolveInfo.unmeasured(system.rhs[0].device)


SOLVERS: dict[str, Solver] = {
    "cg": Solver(_cg, second_order=True),
    # goes on from what earlier solves with the same curvature have found
    "recycled": Solver(_recycled, second_order=True, memory=Directions, lasts_a_phase=True),
    # the authors' published variant
    "blockwise_cg": Solver(_blockwise_cg, second_order=True),
    # an empirical Fisher matrix of recent pretext gradients in place of H
    "mfac": Solver(_mfac, second_order=False, memory=EmpiricalFisher),
    # x = rhs: the implicit Jacobian is the identity
    "identity": Solver(_identity, second_order=False),
    # x = 0: the direct term alone
    "none": Solver(_none, second_order=False),
}


def implicit_gradient(
    curvature: Callable[[Vector], Vector] | None,
    rhs: Sequence[Tensor],
    *,
    proximal_weight: float,
    damping: float,
    max_iterations: int,
    tolerance: float = 0.0,
    solver: str = "cg",
    memory: Memory | None = None,
) -> tuple[Vector, SolveInfo]:
    """Solves `(I + H / (proximal_weight + damping)) x = rhs`.

    Args:
        curvature (`Callable`): gives H times a vector; usually a [`Curvature`]. May be `None` for a solver that takes
            no products (`SOLVERS[solver].second_order` is `False`).
        rhs (`Sequence[torch.Tensor]`): grad_theta L_D(theta_P, phi_D), already averaged over processes.
        proximal_weight (`float`): lambda, above 0.
        damping (`float`): delta, at least 0.
        max_iterations (`int`): largest number of products.
        tolerance (`float`, *optional*, defaults to 0.0): bound on the relative residual at which to stop.
        solver (`str`, *optional*, defaults to `"cg"`): a name of the table `SOLVERS`. Those without products
            report no residual.
        memory (`Memory`, *optional*): what the solver remembers, made by `SOLVERS[solver].memory`: [`Directions`] for
            `"recycled"`, one for all solves with a curvature, or an [`EmpiricalFisher`] for `"mfac"`.

    Returns:
        `tuple[tuple[torch.Tensor, ...], SolveInfo]`: x and an account of the solve.

    Raises:
        `ValueError`: for an unknown solver, numbers out of their range, an empty `rhs`, a missing curvature, or a
            memory for a solver that has none.
        `TypeError`: if a memory is missing or that of another solver.
        `RuntimeError`: if the memory belongs to another curvature or other weights.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(SOLVERS)}.")
    if not 0 < proximal_weight < float("inf"):
        raise ValueError(f"proximal_weight is {proximal_weight}; it must be above 0 and finite.")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be at least 0 and finite.")
    rhs = tuple(rhs)
    check_solve_arguments(rhs, max_iterations, tolerance)
    chosen = SOLVERS[solver]
    if chosen.second_order and curvature is None:
        raise ValueError(f"curvature is None and solver {solver!r} takes products with it; pass a Curvature.")
    if chosen.memory is None and memory is not None:
        raise ValueError(f"memory is a {type(memory).__name__} and solver {solver!r} remembers nothing; leave it out.")
    return chosen.solve(LinearSystem(curvature, rhs, proximal_weight + damping, max_iterations, tolerance, memory))
