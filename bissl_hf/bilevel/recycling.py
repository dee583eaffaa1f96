"""Conjugate gradient for several systems with one matrix, each starting from what the earlier ones have learned.

A solve leaves its search directions P and their images A P behind. They are conjugate, p_i' A p_j = 0 for i != j, so
for the next right-hand side b the best solution in their span is a sum of one term per direction,

    x_0 = sum_i p_i (p_i' b) / (p_i' A p_i),

and conjugate gradient goes on from it with directions that are made conjugate to all of P (Erhel and Guyomarc'h,
2000). No product is spent on a direction twice, and no eigenvalue is estimated: what is divided by is the curvature of
a direction that was found to be positive.

All of this needs a positive definite A. Once a solve has met a direction of negative curvature the stored directions
are no longer used: the solves are then conjugate gradient from zero.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..tensors import Vector
from .linear_solve import (
    CONVERGED,
    ITERATION_LIMIT,
    NEGATIVE_CURVATURE,
    NON_FINITE,
    MatVec,
    SolveInfo,
    apply,
    check_solve_arguments,
    conjugate_gradient,
    flatten,
    largest_entry,
    may_read_device,
    return_sound,
    scaled_norm,
    split,
)

# Directions that are stored together.
_BLOCK = 8


class Directions:
    """The conjugate directions that solves with one matrix hand on. They take two vectors each.

    Args:
        max_directions (`int`, *optional*, defaults to 32): how many to keep. The first ones stay, since they hold the
            largest eigenvalues; the last place is that of the newest one.

    Raises:
        `ValueError`: if `max_directions` is below 1.
    """

    def __init__(self, max_directions: int = 32) -> None:
        if max_directions < 1:
            raise ValueError(f"max_directions is {max_directions}; it must be at least 1.")
        self.max_directions = max_directions
        self._count = 0
        # Blocks of directions, their images, inverse curvatures and whether they are in use (1 or 0), so that none is
        # copied when more come.
        self._blocks: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._matrix: tuple[object, float] | None = None
        # The largest ||A d|| of a direction d of length 1, and whether A has proved not to be positive definite.
        self.largest_image = torch.zeros(())
        self.indefinite = torch.zeros((), dtype=torch.bool)

    def __len__(self) -> int:
        return self._count

    def bind(self, curvature: object, shift: float) -> None:
        """Ties the directions to a matrix at its first use.

        Args:
            curvature (`object`): what gives the products; compared by identity.
            shift (`float`): lambda + delta.

        Raises:
            `RuntimeError`: if they belong to another matrix.
        """
        if self._matrix is None:
            self._matrix = (curvature, shift)
        elif self._matrix[0] is not curvature or self._matrix[1] != shift:
            raise RuntimeError(
                "The directions come from solves with another curvature or another proximal_weight + damping. Start "
                "each upper phase with new Directions."
            )

    def guess(self, rhs: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the best solution in the span of the directions, and its residual; all are flat."""
        solution, residual = torch.zeros_like(rhs), rhs.clone()
        for vectors, images, inverse_curvatures, used in self._stored():
            coefficients = used * inverse_curvatures * (vectors @ rhs)
            solution.addmv_(vectors.T, coefficients)
            residual.addmv_(images.T, coefficients, alpha=-1)
        return solution, residual

    def conjugate(self, vector: Tensor) -> Tensor:
        """Returns a flat vector without its part that is not conjugate to the directions."""
        conjugate = vector.clone()
        for vectors, images, inverse_curvatures, used in self._stored():
            conjugate.addmv_(vectors.T, used * inverse_curvatures * (images @ vector), alpha=-1)
        return conjugate

    def least_residual_of_rhs(self, rhs: Tensor) -> Tensor:
        """Returns a lower bound of `||b - A b||` for a flat b, without a product: each direction d has length 1, so
        that it is at least `|d'(b - A b)| = |(d - A d)'b|`."""
        return torch.stack([((vectors - images) @ rhs).abs().max() for vectors, images, *_ in self._stored()]).max()

    def append(self, vector: Tensor, image: Tensor, inverse_curvature: Tensor) -> None:
        """Adds a flat direction with its image; one with an inverse curvature of 0 has no effect."""
        index = min(self._count, self.max_directions - 1)
        block, row = divmod(index, _BLOCK)
        if block == len(self._blocks):
            rows = min(_BLOCK, self.max_directions - index)
            shapes = ((rows, vector.numel()), (rows, vector.numel()), (rows,), (rows,))
            self._blocks.append(tuple(vector.new_empty(shape) for shape in shapes))  # type: ignore[arg-type]
        values = vector, image, inverse_curvature, torch.ones_like(inverse_curvature)
        for stored, value in zip(self._blocks[block], values, strict=True):
            stored[row] = value
        self._count = index + 1

    def disable(self, where: Tensor) -> None:
        """Takes the stored directions out of use where a condition of shape `()` holds."""
        for *_, used in self._stored():
            used.masked_fill_(where, 0.0)

    def _stored(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yields the rows that hold a direction, block by block."""
        for number, (vectors, images, inverse_curvatures, used) in enumerate(self._blocks):
            rows = self._count - number * _BLOCK
            yield vectors[:rows], images[:rows], inverse_curvatures[:rows], used[:rows]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the directions as tensors; empty if there are none."""
        if not self._blocks:
            return {}
        vectors, images, inverse_curvatures, used = (torch.cat(rows) for rows in zip(*self._stored(), strict=True))
        return {
            "vectors": vectors,
            "images": images,
            "inverse_curvatures": used * inverse_curvatures,
            "largest_image": self.largest_image,
            "indefinite": self.indefinite,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned; the directions are bound at their next use."""
        self._count, self._blocks, self._matrix = 0, [], None
        self.largest_image = state.get("largest_image", torch.zeros(()))
        self.indefinite = state.get("indefinite", torch.zeros((), dtype=torch.bool))
        if state:
            for row in zip(state["vectors"], state["images"], state["inverse_curvatures"], strict=True):
                self.append(*row)


def recycled_conjugate_gradient(
    matvec: MatVec,
    rhs: Sequence[Tensor],
    directions: Directions,
    *,
    max_iterations: int,
    tolerance: float = 0.0,
) -> tuple[Vector, SolveInfo]:
    """Solves `A x = rhs` for a symmetric `A` from the directions of earlier solves with `A`, and adds its own.

    Without directions it is conjugate gradient with full reorthogonalisation. A direction is divided by only if its
    curvature is above eps times the largest `||A d||` seen for a direction d of length 1, which is the rounding error
    of a curvature. On a breakdown with inherited directions those are given up, and the solve starts anew from zero
    with the iterations left. Of its iterates and `x = rhs` the one of the smallest residual is returned; a breakdown
    before the first iterate returns `x = rhs`, as by [`conjugate_gradient`]; the info says so.

    Args:
        matvec (`Callable`): gives `A v` for a vector `v` of the structure of `rhs`.
        rhs (`Sequence[torch.Tensor]`): right-hand side; types as in [`conjugate_gradient`].
        directions ([`Directions`]): of earlier solves with the same `A`; those of this solve are added.
        max_iterations (`int`): largest number of iterations, each of which takes one product.
        tolerance (`float`, *optional*, defaults to 0.0): stop once `||rhs - A x|| <= tolerance * ||rhs||`, which may
            be before the first product. A positive value reads one number per iteration from the device.

    Returns:
        `tuple[tuple[torch.Tensor, ...], SolveInfo]`: the solution and an account of the solve. The residual is that of
        the recursion, which holds the images of the stored directions and so follows the true one down to rounding.
        A solve that starts from inherited directions and misses its tolerance takes one product more, for the
        residual of `x = rhs`, unless the directions show that this is no smaller.

    Raises:
        `ValueError`: as [`conjugate_gradient`].
    """
    rhs = tuple(rhs)
    check_solve_arguments(rhs, max_iterations, tolerance)
    may_stop_early = may_read_device(rhs, tolerance)
    if may_stop_early and bool(directions.indefinite):
        return conjugate_gradient(matvec, rhs, max_iterations=max_iterations, tolerance=tolerance)
    inherited = len(directions) > 0
    flat = flatten(rhs)
    scale = largest_entry(flat)
    recursion = _Recursion(matvec, rhs, flat.div_(scale), directions, tolerance)
    for _ in range(max_iterations):
        if may_stop_early and int(recursion.status) != ITERATION_LIMIT:
            break
        recursion.step(may_stop_early)
    if inherited and not (may_stop_early and recursion.beats_rhs()):
        recursion.measure_rhs()
    solution, info = recursion.result()
    return return_sound(rhs, split(solution.mul_(scale), rhs), info)


class _Recursion:
    """The numbers of one solve, all of which stay on the device. Vectors are flat, scalars of shape `()`.

    Args:
        matvec (`Callable`), rhs (`tuple[torch.Tensor, ...]`): see [`recycled_conjugate_gradient`].
        flat (`torch.Tensor`): the right-hand side b, scaled.
        directions ([`Directions`]), tolerance (`float`): see [`recycled_conjugate_gradient`].
    """

    def __init__(self, matvec: MatVec, rhs: Vector, flat: Tensor, directions: Directions, tolerance: float) -> None:
        self.matvec, self.like, self.rhs, self.directions = matvec, rhs, flat, directions
        self.start = flat.norm()
        self.target = tolerance * self.start
        self.epsilon = torch.finfo(flat.dtype).eps
        directions.largest_image = directions.largest_image.to(flat, non_blocking=True)
        directions.indefinite = directions.indefinite.to(flat.device, non_blocking=True)
        directions.disable(directions.indefinite)

        self.solution, self.residual = directions.guess(flat)
        self.size = self.residual.norm()
        status = torch.where(self.size <= self.target, CONVERGED, ITERATION_LIMIT)
        self.status = torch.where(torch.isfinite(self.size), status, NON_FINITE)
        self.iterations = torch.zeros_like(self.status)
        self.quotient = torch.zeros_like(self.size)
        # Whether the iterate rests on inherited directions, and whether it is still zero.
        self.inherits = ~directions.indefinite & (len(directions) > 0)
        self.is_zero = ~self.inherits
        # Other candidates: an iterate that was given up, and x = rhs.
        self.given_up, self.given_up_size = self.solution, torch.full_like(self.size, float("inf"))
        self.rhs_size = self.given_up_size

    def step(self, may_stop_early: bool) -> None:
        """Takes one product and what follows from it."""
        direction = self.directions.conjugate(self.residual)
        length = direction.norm()
        # Where no more than rounding is left, the residual is in the span of the directions and is rounding too.
        exhausted = length <= self.epsilon * self.size
        direction.div_(torch.where(exhausted, 1.0, length))
        image = apply(self.matvec, direction, self.like)
        # From zero the first direction is b itself.
        running = self.status == ITERATION_LIMIT
        self.rhs_size = torch.where(running & self.is_zero, scaled_norm(self.rhs - length * image), self.rhs_size)
        curvature = direction @ image
        step = (direction @ self.residual) / curvature
        self.residual.addcmul_(image, step, value=-1)
        new_size = self.residual.norm()

        image_size = torch.where(running & ~exhausted, scaled_norm(image), 0.0)
        largest = torch.maximum(self.directions.largest_image, image_size)
        self.directions.largest_image = torch.where(torch.isfinite(largest), largest, self.directions.largest_image)
        found = torch.where(new_size <= self.target, CONVERGED, ITERATION_LIMIT)
        found = torch.where(torch.isfinite(curvature) & torch.isfinite(new_size), found, NON_FINITE)
        negative = torch.isfinite(curvature) & (curvature <= self.epsilon * self.directions.largest_image)
        found = torch.where(negative, NEGATIVE_CURVATURE, found)
        found = torch.where(exhausted, CONVERGED, found)
        accepted = running & ~exhausted & ((found == ITERATION_LIMIT) | (found == CONVERGED))
        broken = running & (found == NEGATIVE_CURVATURE)
        self.quotient = torch.where(broken, curvature, self.quotient)
        self.directions.indefinite = self.directions.indefinite | broken
        restart = broken & self.inherits
        self.status = torch.where(running & ~restart, found, self.status)
        self.iterations = self.iterations + accepted

        # Without a look at the device a step that is not accepted goes on without effect.
        if not may_stop_early or accepted:
            direction.masked_fill_(~accepted, 0.0)
            image.masked_fill_(~accepted, 0.0)
            self.solution.addcmul_(direction, torch.where(accepted, step, 0.0))
            self.directions.append(direction, image, torch.where(accepted, 1.0 / curvature, 0.0))
            self.size = torch.where(accepted, new_size, self.size)
            self.is_zero = self.is_zero & ~accepted
        if not may_stop_early or restart:
            self._start_anew(restart)

    def _start_anew(self, where: Tensor) -> None:
        """Gives up the inherited directions where a condition holds, and puts the iterate aside."""
        self.directions.disable(where)
        self.given_up = torch.where(where, self.solution, self.given_up)
        self.given_up_size = torch.where(where, self.size, self.given_up_size)
        self.solution = self.solution.masked_fill(where, 0.0)
        self.residual = torch.where(where, self.rhs, self.residual)
        self.size = torch.where(where, self.start, self.size)
        self.inherits, self.is_zero = self.inherits & ~where, self.is_zero | where

    def _iterate_size(self) -> Tensor:
        """The residual of the iterate, infinite where that is still zero: `x = 0` is no candidate."""
        return torch.where(self.is_zero & (self.status != CONVERGED), float("inf"), self.size)

    def beats_rhs(self) -> bool:
        """Whether the iterate is as good as asked for, or no worse than x = rhs, as far as is known without a product.
        Reads from the device."""
        if int(self.status) == CONVERGED or not bool(torch.isinf(self.rhs_size)):
            return True
        size = torch.minimum(self._iterate_size(), self.given_up_size)
        return bool(size <= self.directions.least_residual_of_rhs(self.rhs))

    def measure_rhs(self) -> None:
        """Finds the residual of x = rhs by a product, unless it is known."""
        measured = scaled_norm(self.rhs - apply(self.matvec, self.rhs, self.like))
        self.rhs_size = torch.where(torch.isinf(self.rhs_size), measured, self.rhs_size)

    def result(self) -> tuple[Tensor, SolveInfo]:
        """Returns the iterate of the smallest residual, and an account that may ask for x = rhs in place of it."""
        converged = self.status == CONVERGED
        size = self._iterate_size()
        solution = torch.where(self.given_up_size < size, self.given_up, self.solution)
        size = torch.minimum(self.given_up_size, size)
        returns_rhs = ~converged & (~torch.isfinite(size) | (self.rhs_size < size))
        residual = torch.where(self.start == 0, 0.0, torch.where(returns_rhs, self.rhs_size, size) / self.start)
        met_negative = (self.status == ITERATION_LIMIT) & torch.isfinite(self.given_up_size)
        status = torch.where(met_negative, NEGATIVE_CURVATURE, self.status)
        return solution, SolveInfo(self.iterations, residual, status, self.quotient, returns_rhs)
