"""Conjugate gradient for several systems with one matrix, each starting from what the earlier ones have learned.

A solve leaves its search directions P and their images A P behind. They are conjugate, p_i' A p_j = 0 for i != j, so
for the next right-hand side b the best solution in their span is a sum of one term per direction,

    x_0 = sum_i p_i (p_i' b) / (p_i' A p_i),

and conjugate gradient goes on from it with directions that are made conjugate to all of P (Erhel and Guyomarc'h,
2000). No product is spent on a direction twice, and no eigenvalue is estimated: what is divided by is the curvature of
a direction that was found to be positive.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..tensors import Vector, check_same_structure
from .linear_solve import (
    CONVERGED,
    ITERATION_LIMIT,
    NEGATIVE_CURVATURE,
    NON_FINITE,
    MatVec,
    SolveInfo,
    check_solve_arguments,
    largest_entry,
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
        # Blocks of directions, their images and inverse curvatures, so that none is copied when more come.
        self._blocks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._matrix: tuple[object, float] | None = None

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
        for vectors, images, inverse_curvatures in self._stored():
            coefficients = inverse_curvatures * (vectors @ rhs)
            solution.addmv_(vectors.T, coefficients)
            residual.addmv_(images.T, coefficients, alpha=-1)
        return solution, residual

    def conjugate(self, vector: Tensor) -> Tensor:
        """Returns a flat vector without its part that is not conjugate to the directions."""
        conjugate = vector.clone()
        for vectors, images, inverse_curvatures in self._stored():
            conjugate.addmv_(vectors.T, inverse_curvatures * (images @ vector), alpha=-1)
        return conjugate

    def append(self, vector: Tensor, image: Tensor, inverse_curvature: Tensor) -> None:
        """Adds a flat direction with its image; one with an inverse curvature of 0 has no effect."""
        index = min(self._count, self.max_directions - 1)
        block, row = divmod(index, _BLOCK)
        if block == len(self._blocks):
            rows = min(_BLOCK, self.max_directions - index)
            shapes = ((rows, vector.numel()), (rows, vector.numel()), (rows,))
            self._blocks.append(tuple(vector.new_empty(shape) for shape in shapes))  # type: ignore[arg-type]
        for stored, value in zip(self._blocks[block], (vector, image, inverse_curvature), strict=True):
            stored[row] = value
        self._count = index + 1

    def _stored(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields the rows in use, block by block."""
        for number, (vectors, images, inverse_curvatures) in enumerate(self._blocks):
            used = self._count - number * _BLOCK
            yield vectors[:used], images[:used], inverse_curvatures[:used]

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the directions as tensors; empty if there are none."""
        if not self._blocks:
            return {}
        vectors, images, inverse_curvatures = (torch.cat(rows) for rows in zip(*self._stored(), strict=True))
        return {"vectors": vectors, "images": images, "inverse_curvatures": inverse_curvatures}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned; the directions are bound at their next use."""
        self._count, self._blocks, self._matrix = 0, [], None
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

    Without directions it is conjugate gradient with full reorthogonalisation. On a breakdown the last sound iterate is
    returned, as by [`conjugate_gradient`]; the direction that broke down is not handed on.

    Args:
        matvec (`Callable`): gives `A v` for a vector `v` of the structure of `rhs`.
        rhs (`Sequence[torch.Tensor]`): right-hand side.
        directions ([`Directions`]): of earlier solves with the same `A`; those of this solve are added.
        max_iterations (`int`): largest number of iterations, each of which takes one product.
        tolerance (`float`, *optional*, defaults to 0.0): stop once `||rhs - A x|| <= tolerance * ||rhs||`, which may
            be before the first product. A positive value reads one number per iteration from the device.

    Returns:
        `tuple[tuple[torch.Tensor, ...], SolveInfo]`: the solution and an account of the solve. The residual is that of
        the recursion, which holds the images of the stored directions and so follows the true one down to rounding.

    Raises:
        `ValueError`: as [`conjugate_gradient`].
    """
    rhs = tuple(rhs)
    check_solve_arguments(rhs, max_iterations, tolerance)
    # Whether to look at the device's numbers inside the loop: free on a CPU, a synchronisation elsewhere.
    may_stop_early = tolerance > 0 or rhs[0].device.type == "cpu"

    scale = largest_entry(rhs)
    flat = _flatten(rhs).div_(scale)
    start = flat.norm()
    epsilon = torch.finfo(flat.dtype).eps
    solution, residual = directions.guess(flat)
    size = residual.norm()
    status = torch.where(size <= tolerance * start, CONVERGED, ITERATION_LIMIT)
    status = torch.where(torch.isfinite(size), status, NON_FINITE)
    iterations = torch.zeros_like(status)
    for _ in range(max_iterations):
        if may_stop_early and int(status) != ITERATION_LIMIT:
            break
        direction = directions.conjugate(residual)
        length = direction.norm()
        # Where no more than rounding is left, the residual lies in the span of the directions and is rounding too.
        exhausted = length <= epsilon * size
        direction.div_(torch.where(exhausted, 1.0, length))
        product = matvec(_split(direction, rhs))
        check_same_structure(product, rhs, names=("the product", "rhs"))
        image = _flatten(product)
        curvature = direction @ image
        step = (direction @ residual) / curvature
        # Nothing reads the residual after a breakdown, so it may take in what is not sound.
        residual.addcmul_(image, step, value=-1)
        new_size = residual.norm()

        found = torch.where(new_size <= tolerance * start, CONVERGED, ITERATION_LIMIT)
        found = torch.where(torch.isfinite(curvature) & torch.isfinite(new_size), found, NON_FINITE)
        # A curvature within its rounding error tells no sign, and nothing may be divided by it in later solves.
        negative = torch.isfinite(curvature) & (curvature <= epsilon * image.norm())
        found = torch.where(negative, NEGATIVE_CURVATURE, found)
        found = torch.where(exhausted, CONVERGED, found)
        running = status == ITERATION_LIMIT
        status = torch.where(running, found, status)
        accepted = running & ~exhausted & ((found == ITERATION_LIMIT) | (found == CONVERGED))

        if not may_stop_early:
            # After a stop the loop goes on without effect.
            direction.masked_fill_(~accepted, 0.0)
            image.masked_fill_(~accepted, 0.0)
        elif not accepted:
            break
        solution.addcmul_(direction, torch.where(accepted, step, 0.0))
        directions.append(direction, image, torch.where(accepted, 1.0 / curvature, 0.0))
        size = torch.where(accepted, new_size, size)
        iterations = iterations + accepted

    relative = torch.where(start == 0, 0.0, size / start)
    solution.mul_(scale).masked_fill_(~torch.isfinite(start), 0.0)
    return _split(solution, rhs), SolveInfo(iterations, relative, status)


def _flatten(vector: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in vector])


def _split(flat: Tensor, like: Vector) -> Vector:
    parts = flat.split([tensor.numel() for tensor in like])
    return tuple(part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True))
