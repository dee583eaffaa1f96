"""Conjugate gradient for symmetric systems given by a product. Numerics only: nothing here knows a model.

Vectors are tuples of tensors. Inside a solve they are one flat buffer, so that a step takes a few kernels whatever the
number of tensors. The scalars of the iteration stay on the device: nothing is read back unless a tolerance asks for
it, so that a fixed number of iterations costs no synchronisation of host and device.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..tensors import Vector, at_least_float32, block_dots, check_same_structure

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
        residual_tensor (`torch.Tensor`): `||rhs - A x|| / ||rhs||` of the solution returned, shape `()`; NaN where the
            solver takes no product. Conjugate gradient takes it from its recursion, which follows the true residual
            down to rounding: below about 1e-6 in float32 it promises more than the solution holds. Where products or
            `rhs` are not finite, so that nothing is known of the solution, it is 1, that of `x = 0`.
        status_tensor (`torch.Tensor`): position in [`SolveStatus`], shape `()`.
        rayleigh_quotient_tensor (`torch.Tensor`): `v'Av / v'v` of the direction v of negative or zero curvature at
            which the solve stopped, shape `()`; 0 if there was none. See [`sufficient_damping`].
        returned_rhs_tensor (`torch.Tensor`): whether the solver gave up its own iterate for `x = rhs`, shape `()`.
    """

    iterations_tensor: Tensor
    residual_tensor: Tensor
    status_tensor: Tensor
    rayleigh_quotient_tensor: Tensor
    returned_rhs_tensor: Tensor

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

    @property
    def rayleigh_quotient(self) -> float:
        """`v'Av / v'v` of the direction of negative curvature at which the solve stopped; 0 if there was none."""
        return float(self.rayleigh_quotient_tensor)

    @property
    def returned_rhs(self) -> bool:
        """Whether `x = rhs` was returned, since no iterate was found or none was better."""
        return bool(self.returned_rhs_tensor)

    @property
    def worse_than_no_solve(self) -> bool:
        """Whether the residual is above 1, which is that of `x = 0`."""
        return self.residual > 1

    @classmethod
    def unmeasured(cls, device: torch.device) -> "SolveInfo":
        """Returns the account of a solver that takes no product."""
        return cls(
            iterations_tensor=torch.zeros((), dtype=torch.long, device=device),
            residual_tensor=torch.full((), float("nan"), device=device),
            status_tensor=torch.full((), ITERATION_LIMIT, device=device),
            rayleigh_quotient_tensor=torch.zeros((), device=device),
            returned_rhs_tensor=torch.zeros((), dtype=torch.bool, device=device),
        )


def conjugate_gradient(
    matvec: MatVec,
    rhs: Sequence[Tensor],
    *,
    max_iterations: int,
    tolerance: float = 0.0,
    blockwise: bool = False,
) -> tuple[Vector, SolveInfo]:
    """Solves `A x = rhs` for a symmetric `A` by conjugate gradient, starting from zero (Hestenes and Stiefel, 1952).

    On a breakdown, a direction of negative (or zero) curvature or a number that is not finite, the last sound iterate
    is returned and the status says what happened. As in the truncated Newton method (Dembo and Steihaug, 1983) a
    breakdown before the first iterate returns `x = rhs`, and so does a solve whose residual is larger than that of
    `x = rhs`, which the first product gives. The info says so. A right-hand side that is not finite gives zero.

    Args:
        matvec (`Callable`): gives `A v` for a vector `v` of the structure of `rhs`, which is written over after it.
        rhs (`Sequence[torch.Tensor]`): right-hand side. Its tensors may differ in their floating-point types: the
            solve computes in the widest, at least float32, and the solution has the types of `rhs`.
        max_iterations (`int`): largest number of iterations, each of which takes one product.
        tolerance (`float`, *optional*, defaults to 0.0): stop once `||rhs - A x|| <= tolerance * ||rhs||`, with the
            residual of the recursion. A positive value reads one number per iteration from the device.
        blockwise (`bool`, *optional*, defaults to `False`): the variant of the BiSSL authors' published code, with
            step lengths of their own for each tensor. It is not conjugate gradient where `A` couples the tensors and
            its residual may grow. It always takes `max_iterations` steps, stops on non-finite numbers only, spends
            one more product to report its true residual, and returns its iterate however large that is.

    Returns:
        `tuple[tuple[torch.Tensor, ...], SolveInfo]`: the solution and an account of the solve.

    Raises:
        `ValueError`: if `rhs` has no entries, spans devices, or is not of floating-point type; if `max_iterations` is
            below 1 or `tolerance` is negative.

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
    if blockwise:
        if tolerance > 0:
            warnings.warn(
                f"tolerance={tolerance} is ignored by the blockwise variant: the residual of its recursion is not "
                "that of the system. Use plain conjugate gradient for a stopping rule.",
                stacklevel=2,
            )
        return _measured(matvec, rhs, *_iterate(matvec, rhs, max_iterations, 0.0, blockwise=True))
    return _iterate(matvec, rhs, max_iterations, tolerance, blockwise=False)


def sufficient_damping(
    rayleigh_quotient: float, *, proximal_weight: float, damping: float, quotient: float = 0.5
) -> float:
    """Returns a damping with which a solve would not have stopped at the direction at which it stopped.

    The matrix of a solve is A = I + H / (lambda + delta). Along a direction v with h = v'Hv / v'v its Rayleigh
    quotient is rho = 1 + h / (lambda + delta), so that h = (rho - 1) (lambda + delta). With another damping delta'
    the quotient along v is 1 + h / (lambda + delta'), which is q for

        lambda + delta' = (1 - rho) (lambda + delta) / (1 - q).

    For any q above 0 the curvature along v is positive. It is no bound for every other direction, of which some may
    be of more negative curvature; q leaves room for them: with q = 0.5, the default, h may be twice as negative.

    Args:
        rayleigh_quotient (`float`): rho, from [`SolveInfo`].
        proximal_weight (`float`): lambda of that solve.
        damping (`float`): delta of that solve.
        quotient (`float`, *optional*, defaults to 0.5): q, the Rayleigh quotient wanted along v, from 0 up to below 1.

    Returns:
        `float`: delta', at least `damping`.

    Raises:
        `ValueError`: if `quotient` is out of its range or `rayleigh_quotient` is not finite.
    """
    if not 0 <= quotient < 1:
        raise ValueError(f"quotient is {quotient}; it must be at least 0 and below 1.")
    if not abs(rayleigh_quotient) < float("inf"):
        raise ValueError(f"rayleigh_quotient is {rayleigh_quotient}; it must be finite.")
    shift = (1 - rayleigh_quotient) * (proximal_weight + damping) / (1 - quotient)
    return max(damping, shift - proximal_weight)


def check_solve_arguments(rhs: Vector, max_iterations: int, tolerance: float) -> None:
    """Refuses arguments that no solver takes.

    Raises:
        `ValueError`: with the argument, its value and what is allowed.
    """
    if not any(tensor.numel() for tensor in rhs):
        raise ValueError(f"rhs is empty ({len(rhs)} tensors); a right-hand side of at least one number is needed.")
    for index, tensor in enumerate(rhs):
        if not tensor.is_floating_point():
            raise ValueError(f"Tensor {index} of rhs is of type {tensor.dtype}; it must be of a floating-point type.")
        if tensor.device != rhs[0].device:
            raise ValueError(
                f"Tensor {index} of rhs is on {tensor.device} and tensor 0 on {rhs[0].device}; they must agree."
            )
    if max_iterations < 1:
        raise ValueError(f"max_iterations is {max_iterations}; it must be at least 1.")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance is {tolerance}; it must be a finite number of at least 0.")


class _Blocks:
    """The scalars of a recursion: one for the whole vector, or one per tensor.

    Args:
        sizes (`list[int]`): entries of each tensor; they add up to n.
        blockwise (`bool`): whether each tensor has scalars of its own.
    """

    def __init__(self, sizes: list[int], blockwise: bool) -> None:
        self._sizes, self._blockwise = sizes, blockwise

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """Inner products of two flat vectors, shape `()` or `(tensors,)`."""
        return block_dots(x.split(self._sizes), y.split(self._sizes)) if self._blockwise else torch.dot(x, y)

    def spread(self, values: Tensor) -> Tensor:
        """Repeats the scalar of each tensor for its entries, shape `(n,)`; a single scalar spreads by itself."""
        if not self._blockwise:
            return values
        return torch.cat([value.expand(size) for value, size in zip(values.unbind(), self._sizes, strict=True)])


def _iterate(
    matvec: MatVec, rhs: Vector, max_iterations: int, tolerance: float, *, blockwise: bool
) -> tuple[Vector, SolveInfo]:
    """The recursion on flat vectors of n entries. Its scalars have shape `()` in plain conjugate gradient and one
    entry per tensor, shape `(tensors,)`, in the blockwise variant."""
    blocks = _Blocks([tensor.numel() for tensor in rhs], blockwise)
    products, spread = blocks.products, blocks.spread
    may_stop_early = may_read_device(rhs, tolerance)
    flat = flatten(rhs)
    scale = largest_entry(flat)
    # The vectors of the recursion are written in place: memory, not arithmetic, is what they take.
    residual = flat.div_(scale)
    solution = torch.zeros_like(residual)
    start = squares = products(residual, residual)
    length = start.sum().sqrt()
    status = torch.where(torch.isfinite(squares).all(), ITERATION_LIMIT, NON_FINITE)
    status = torch.where((squares == 0).all(), CONVERGED, status)
    iterations = torch.zeros_like(status)
    quotient, rhs_residual = torch.zeros_like(length), torch.full_like(length, float("inf"))
    direction = residual.masked_fill(status != ITERATION_LIMIT, 0.0)

    for number in range(max_iterations):
        if may_stop_early and int(status) != ITERATION_LIMIT:
            break
        image = apply(matvec, direction, rhs)  # A p, (n,)
        if number == 0:
            rhs_residual = scaled_norm(residual - image) / length
        curvature = products(direction, image)  # p'A p
        # A block whose residual is zero is solved: its step is 0, not 0 / 0.
        step = torch.where(squares == 0, 0.0, squares / curvature)  # r'r / p'A p
        residual.addcmul_(image, spread(-step))
        new_squares = products(residual, residual)
        # Subnormal squares count as zero: the next curvature could vanish before them and look like a breakdown.
        new_squares = torch.where(new_squares < torch.finfo(new_squares.dtype).tiny, 0.0, new_squares)

        running = status == ITERATION_LIMIT
        finite = torch.isfinite(curvature).all() & torch.isfinite(step).all() & torch.isfinite(new_squares).all()
        found = torch.where(finite, ITERATION_LIMIT, NON_FINITE)
        if not blockwise:
            negative = torch.isfinite(curvature) & (curvature <= 0)
            found = torch.where(negative, NEGATIVE_CURVATURE, found)
            # The length of a direction that goes on is positive: it contains a residual that is not zero.
            quotient = torch.where(running & negative, curvature / torch.dot(direction, direction), quotient)
        status = torch.where(running, found, status)
        accepted = status == ITERATION_LIMIT
        if not may_stop_early:
            # After a stop the loop goes on without effect: direction and step are zero from here.
            residual.masked_fill_(~accepted, 0.0)

        solution.addcmul_(direction, spread(torch.where(accepted, step, 0.0)))
        ratio = torch.where(accepted & (squares > 0), new_squares / squares, 0.0)
        direction.mul_(spread(ratio)).add_(residual)
        squares = torch.where(accepted, new_squares, squares)
        iterations = iterations + accepted
        done = accepted & (squares.sum() == 0 if tolerance == 0 else squares.sum().sqrt() <= tolerance * length)
        status = torch.where(done, CONVERGED, status)

    size = torch.where(length == 0, 0.0, squares.sum().sqrt() / length)
    broke_before_first = (iterations == 0) & (status != CONVERGED)
    better = broke_before_first if blockwise else broke_before_first | (rhs_residual < size)
    info = SolveInfo(iterations, torch.where(better, rhs_residual, size), status, quotient, better)
    return return_sound(rhs, split(solution.mul_(scale), rhs), info)


def _measured(matvec: MatVec, rhs: Vector, solution: Vector, info: SolveInfo) -> tuple[Vector, SolveInfo]:
    """Puts the true residual of a solution, by one product, in place of that of its recursion."""
    flat = flatten(rhs)
    error = flat - apply(matvec, flatten(solution), rhs)
    size = scaled_norm(flat)
    residual = torch.where(size == 0, 0.0, scaled_norm(error) / size)
    unsound = ~torch.isfinite(residual)  # A x overflows: the iterate is no sound one
    status = torch.where(unsound, NON_FINITE, info.status_tensor)
    returned_rhs = info.returned_rhs_tensor | unsound
    info = SolveInfo(info.iterations_tensor, residual, status, info.rayleigh_quotient_tensor, returned_rhs)
    return return_sound(rhs, solution, info)


def return_sound(rhs: Vector, solution: Vector, info: SolveInfo) -> tuple[Vector, SolveInfo]:
    """Returns a solution and its info, with `rhs` in place of it where the info says so and zero where `rhs` is not
    finite. A residual that is not known becomes 1."""
    sound = torch.stack([torch.isfinite(tensor).all() for tensor in rhs]).all()
    returned_rhs = info.returned_rhs_tensor & sound
    chosen = tuple(
        torch.where(returned_rhs, b, x.masked_fill(~sound, 0.0)) for b, x in zip(rhs, solution, strict=True)
    )
    residual = torch.where(torch.isfinite(info.residual_tensor), info.residual_tensor, 1.0)
    return chosen, SolveInfo(
        info.iterations_tensor, residual, info.status_tensor, info.rayleigh_quotient_tensor, returned_rhs
    )


def may_read_device(rhs: Vector, tolerance: float) -> bool:
    """Whether a loop may look at the device's numbers: free on a CPU, a synchronisation elsewhere, which only a
    tolerance asks for."""
    return tolerance > 0 or rhs[0].device.type == "cpu"


def apply(matvec: MatVec, flat: Tensor, like: Vector) -> Tensor:
    """Returns the product with a flat vector as a flat vector."""
    image = matvec(split(flat, like))
    check_same_structure(image, like, names=("the product", "rhs"))
    return flatten(image).to(flat.dtype)


def flatten(vector: Sequence[Tensor]) -> Tensor:
    """Returns a new flat vector of the widest type of the tensors, at least float32."""
    return at_least_float32(torch.cat([tensor.reshape(-1) for tensor in vector]))


def split(flat: Tensor, like: Vector) -> Vector:
    """Returns a flat vector in the structure of another: views where the types agree."""
    parts = flat.split([tensor.numel() for tensor in like])
    return tuple(part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True))


def largest_entry(flat: Tensor) -> Tensor:
    """Returns the largest absolute entry, or 1 if it is zero or not finite. Dividing by it keeps squares of tiny or
    huge right-hand sides from vanishing or overflowing."""
    largest = flat.abs().max()
    return torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)


def scaled_norm(flat: Tensor) -> Tensor:
    """Returns the Euclidean norm of a flat vector, whose squares may overflow or vanish."""
    largest = largest_entry(flat)
    return torch.linalg.vector_norm(flat / largest) * largest
