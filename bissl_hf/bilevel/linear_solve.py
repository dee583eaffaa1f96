"""Conjugate gradient for symmetric systems given by a product. Numerics only: nothing here knows a model.

Vectors are tuples of tensors. The scalars of the iteration stay on the device: nothing is read back unless a tolerance
asks for it, so that a fixed number of iterations costs no synchronisation of host and device.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..tensors import Vector, block_dots, check_same_structure, norm, subtract

MatVec = Callable[[Vector], Vector]


class SolveStatus(StrEnum):
    """How a linear solve ended."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration_limit"
    NEGATIVE_CURVATURE = "negative_curvature"
    NON_FINITE = "non_finite"


_STATUSES = tuple(SolveStatus)
# Positions in SolveStatus: a status that stays on the device is one of these.
CONVERGED, ITERATION_LIMIT, NEGATIVE_CURVATURE, NON_FINITE = range(4)


@dataclass(frozen=True)
class SolveInfo:
    """What a linear solve did. The numbers stay on the device until one of them is read.

    Args:
        iterations_tensor (`torch.Tensor`): number of accepted iterations, shape `()`.
        residual_tensor (`torch.Tensor`): `||rhs - A x|| / ||rhs||`, shape `()`; NaN where it was not measured. Plain
            conjugate gradient takes it from its recursion, which follows the true residual down to rounding: below
            about 1e-6 in float32 it promises more than the solution holds.
        status_tensor (`torch.Tensor`): position in [`SolveStatus`], shape `()`.
    """

    iterations_tensor: Tensor
    residual_tensor: Tensor
    status_tensor: Tensor

    @property
    def iterations(self) -> int:
        """Number of accepted iterations."""
        return int(self.iterations_tensor)

    @property
    def residual(self) -> float:
        """Relative residual `||rhs - A x|| / ||rhs||`."""
        return float(self.residual_tensor)

    @property
    def status(self) -> SolveStatus:
        """Why the solve stopped."""
        return _STATUSES[int(self.status_tensor)]


def conjugate_gradient(
    matvec: MatVec,
    rhs: Sequence[Tensor],
    *,
    max_iterations: int,
    tolerance: float = 0.0,
    blockwise: bool = False,
) -> tuple[Vector, SolveInfo]:
    """Solves `A x = rhs` for a symmetric `A` by conjugate gradient, starting from zero (Hestenes and Stiefel, 1952).

    On a breakdown the last sound iterate is returned and the status says what happened: a direction of negative (or
    zero) curvature, or a number that is not finite.

    Args:
        matvec (`Callable`): gives `A v` for a vector `v` of the structure of `rhs`, which is written over after it.
        rhs (`Sequence[torch.Tensor]`): right-hand side.
        max_iterations (`int`): largest number of iterations, each of which takes one product.
        tolerance (`float`, *optional*, defaults to 0.0): stop once `||rhs - A x|| <= tolerance * ||rhs||`, with the
            residual of the recursion. A positive value reads one number per iteration from the device.
        blockwise (`bool`, *optional*, defaults to `False`): the variant of the BiSSL authors' published code, with
            step lengths of their own for each tensor. It is not conjugate gradient where `A` couples the tensors and
            its residual may grow. It always takes `max_iterations` steps, stops on non-finite numbers only, and spends
            one more product to report its true residual.

    Returns:
        `tuple[tuple[torch.Tensor, ...], SolveInfo]`: the solution and an account of the solve.

    Raises:
        `ValueError`: if `rhs` is empty, `max_iterations` is below 1 or `tolerance` is negative.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.bilevel.linear_solve import conjugate_gradient
    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    >>> solution, info = conjugate_gradient(lambda v: (matrix @ v[0],), (torch.tensor([1.0, 2.0]),), max_iterations=2)
    >>> solution[0], info.iterations
    (tensor([0.2000, 0.6000]), 2)
    ```
    """
    rhs = tuple(rhs)
    check_solve_arguments(rhs, max_iterations, tolerance)
    if blockwise and tolerance > 0:
        warnings.warn(
            f"tolerance={tolerance} is ignored by the blockwise variant: the residual of its recursion is not that of "
            "the system. Use plain conjugate gradient for a stopping rule.",
            stacklevel=2,
        )
        tolerance = 0.0
    solution, info = _iterate(matvec, rhs, max_iterations, tolerance, blockwise)
    if blockwise:
        scale = largest_entry(rhs)
        vectors = subtract(rhs, matvec(solution)), rhs
        error, size = (norm([tensor / scale for tensor in vector]) for vector in vectors)
        residual = torch.where(size == 0, 0.0, error / size)
        info = SolveInfo(info.iterations_tensor, residual, info.status_tensor)
    return solution, info


def check_solve_arguments(rhs: Vector, max_iterations: int, tolerance: float) -> None:
    """Refuses arguments that no solver takes.

    Raises:
        `ValueError`: with the argument, its value and what is allowed.
    """
    if not rhs:
        raise ValueError("rhs is empty; a right-hand side of at least one tensor is needed.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; it must be at least 1.")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance}; it must be a finite number of at least 0.")


def _iterate(
    matvec: MatVec, rhs: Vector, max_iterations: int, tolerance: float, blockwise: bool
) -> tuple[Vector, SolveInfo]:
    """The recursion. A scalar of the method is a tensor with one entry per tensor of the vector: equal entries in
    plain conjugate gradient, an entry of its own for each tensor in the blockwise variant."""

    def products(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
        dots = block_dots(x, y)
        return dots if blockwise else dots.sum().expand_as(dots)

    def relative_residual(squares: Tensor) -> Tensor:
        return (squares.sum() / start.sum()).sqrt()

    # Whether to look at the device's numbers inside the loop: free on a CPU, a synchronisation elsewhere.
    may_stop_early = tolerance > 0 or rhs[0].device.type == "cpu"

    scale = largest_entry(rhs)
    # The vectors of the recursion are written in place: memory, not arithmetic, is what they take.
    solution = [torch.zeros_like(tensor) for tensor in rhs]
    residual = [tensor / scale for tensor in rhs]
    start = squares = products(residual, residual)
    status = torch.where(torch.isfinite(squares).all(), ITERATION_LIMIT, NON_FINITE)
    status = torch.where((squares == 0).all(), CONVERGED, status)
    iterations = torch.zeros_like(status)
    direction = [tensor.masked_fill(status != ITERATION_LIMIT, 0.0) for tensor in residual]

    for _ in range(max_iterations):
        if may_stop_early and int(status) != ITERATION_LIMIT:
            break
        image = matvec(tuple(direction))
        check_same_structure(image, rhs, names=("the product", "rhs"))
        curvature = products(direction, image)
        # A block whose residual is zero is solved: its step is 0, not 0 / 0.
        step = torch.where(squares == 0, 0.0, squares / curvature)
        torch._foreach_addcmul_(residual, list(image), list(-step))
        new_squares = products(residual, residual)
        # Subnormal squares count as zero: the next curvature could vanish before them and look like a breakdown.
        new_squares = torch.where(new_squares < torch.finfo(new_squares.dtype).tiny, 0.0, new_squares)

        finite = torch.isfinite(curvature).all() & torch.isfinite(step).all() & torch.isfinite(new_squares).all()
        found = torch.where(finite, ITERATION_LIMIT, NON_FINITE)
        if not blockwise:
            found = torch.where(torch.isfinite(curvature[0]) & (curvature[0] <= 0), NEGATIVE_CURVATURE, found)
        running = status == ITERATION_LIMIT
        status = torch.where(running, found, status)
        accepted = status == ITERATION_LIMIT
        if not may_stop_early:
            # After a stop the loop goes on without effect: direction and step are zero from here.
            for tensor in residual:
                tensor.masked_fill_(~accepted, 0.0)

        torch._foreach_addcmul_(solution, direction, list(torch.where(accepted, step, 0.0)))
        ratio = torch.where(accepted & (squares > 0), new_squares / squares, 0.0)
        torch._foreach_mul_(direction, list(ratio))
        torch._foreach_add_(direction, residual)
        squares = torch.where(accepted, new_squares, squares)
        iterations = iterations + accepted
        done = accepted & (squares.sum() == 0 if tolerance == 0 else relative_residual(squares) <= tolerance)
        status = torch.where(done, CONVERGED, status)

    torch._foreach_mul_(solution, scale)
    residual_size = torch.where(start.sum() == 0, 0.0, relative_residual(squares))
    return tuple(solution), SolveInfo(iterations, residual_size, status)


def largest_entry(vector: Vector) -> Tensor:
    """Returns the largest absolute entry, or 1 if it is zero or not finite. Dividing by it keeps squares of tiny or
    huge right-hand sides from vanishing or overflowing."""
    largest = torch.stack([tensor.abs().max() for tensor in vector]).max()
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
