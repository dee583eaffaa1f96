"""The implicit gradient with an empirical Fisher matrix of recent pretext gradients in place of the Hessian.

With the last m gradients g_i of the lower loss (without its proximal term) and lambda' = lambda + delta,

    x = lambda' (lambda' I + (1/m) sum_i g_i g_i')^-1 v,

the form of M-FAC (Frantar, Kurtic and Alistarh, arXiv 2107.03356). With the gradients as the rows of B, the Woodbury
identity makes it exact by a system of m unknowns:

    x = v - B' (m lambda' I + B B')^-1 B v.

No product with a curvature is taken and no second-order graph is built.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import Vector
from .linear_solve import flatten, split

# Columns of the gradients that are taken into float64 at a time.
_COLUMNS = 1 << 18


class EmpiricalFisher:
    """The last gradients of the lower loss, each of which takes the memory of one vector.

    Recording and solving read nothing from the device, unless the gradients are kept on another one.

    Args:
        size (`int`, *optional*, defaults to 20): m, how many gradients to keep.
        per_tensor (`bool`, *optional*, defaults to `False`): whether each tensor has a matrix and a system of its own,
            so that the matrix is block-diagonal.
        device (`torch.device`, *optional*): where to keep the gradients; that of the first gradient if `None`.

    Raises:
        `ValueError`: if `size` is below 1.
    """

    def __init__(self, size: int = 20, *, per_tensor: bool = False, device: torch.device | str | None = None) -> None:
        if size < 1:
            raise ValueError(f"size is {size}; it must be at least 1.")
        self.size, self.per_tensor, self.device = size, per_tensor, device
        self._rows: Tensor | None = None  # (size, n), zero where nothing was recorded
        self._next = torch.zeros(1, dtype=torch.long)  # the row to write
        self._count = torch.zeros((), dtype=torch.long)
        self._gram: Tensor | None = None  # B B' of each block, until the next gradient

    def __len__(self) -> int:
        return int(self._count)

    def record(self, gradient: Sequence[Tensor]) -> None:
        """Keeps a gradient in place of the oldest one; one that is not finite is left out.

        Args:
            gradient (`Sequence[torch.Tensor]`): of the lower loss in theta_P, already averaged over processes.

        Raises:
            `ValueError`: if it has another number of entries than those before.
        """
        flat = flatten([tensor.detach() for tensor in gradient])
        if self.device is not None:
            flat = flat.to(self.device)
        if self._rows is None:
            self._allocate(flat)
        rows = self._check_size(flat, "The gradient")
        finite = torch.isfinite(flat).all()
        # Without a look at the device: where the gradient is not finite its row is written as it was.
        rows.index_copy_(0, self._next, torch.where(finite, flat.to(rows.dtype), rows.index_select(0, self._next)))
        self._next = (self._next + finite) % self.size
        self._count = (self._count + finite).clamp_max(self.size)
        self._gram = None

    def solve(self, rhs: Vector, shift: float) -> Vector:
        """Returns `shift (shift I + (1/m) sum_i g_i g_i')^-1 rhs`, and `rhs` itself while nothing is recorded.

        Args:
            rhs (`tuple[torch.Tensor, ...]`): v.
            shift (`float`): lambda', above 0.

        Raises:
            `ValueError`: if `rhs` has another number of entries than the gradients.
        """
        if self._rows is None:
            return rhs
        flat = flatten(rhs)
        rows = self._check_size(flat, "rhs")
        x = flat.to(rows.device, rows.dtype)
        blocks = self._blocks(rhs)
        if self._gram is None or len(self._gram) != len(blocks):
            self._gram = torch.stack([_gram(rows[:, block]) for block in blocks])  # (blocks, size, size)
        m = self._count.clamp_min(1).double()
        system = self._gram + m * shift * torch.eye(self.size, dtype=torch.float64, device=rows.device)
        projected = torch.stack([rows[:, block] @ x[block] for block in blocks])  # (blocks, size)
        factor, _ = torch.linalg.cholesky_ex(system)  # positive definite: no check, which would wait for the device
        weights = torch.cholesky_solve(projected.double().unsqueeze(2), factor).squeeze(2).to(rows.dtype)
        for block, weight in zip(blocks, weights, strict=True):
            x[block].addmv_(rows[:, block].T, weight, alpha=-1)
        return split(x.to(flat.device), rhs)

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the gradients recorded, as tensors; empty if there are none."""
        if self._rows is None or not len(self):
            return {}
        return {
            "gradients": self._rows[: len(self)],
            "next": self._next,
            "size": torch.tensor(self.size),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            `ValueError`: if it was made with another `size`.
        """
        self._rows = self._gram = None
        self._next, self._count = torch.zeros(1, dtype=torch.long), torch.zeros((), dtype=torch.long)
        if not state:
            return
        if int(state["size"]) != self.size:
            raise ValueError(
                f"The saved gradients belong to a memory of {int(state['size'])} and this one has size {self.size}; "
                "go on with the same solver_memory."
            )
        gradients = state["gradients"] if self.device is None else state["gradients"].to(self.device)
        self._allocate(gradients[0])[: len(gradients)] = gradients
        self._next = state["next"].to(gradients.device, copy=True)
        self._count = self._count + len(gradients)

    def _allocate(self, flat: Tensor) -> Tensor:
        self._rows = flat.new_zeros(self.size, flat.numel())
        self._next, self._count = self._next.to(flat.device), self._count.to(flat.device)
        return self._rows

    def _check_size(self, flat: Tensor, name: str) -> Tensor:
        """Returns the rows, if a flat vector fits them."""
        if self._rows is None or self._rows.shape[1] != flat.numel():
            expected = "none" if self._rows is None else self._rows.shape[1]
            raise ValueError(
                f"{name} has {flat.numel()} entries and the gradients recorded have {expected}; they must be of the "
                "same parameters."
            )
        return self._rows

    def _blocks(self, rhs: Vector) -> list[slice]:
        """The columns of each system."""
        sizes = [tensor.numel() for tensor in rhs if tensor.numel()]
        if not self.per_tensor:
            return [slice(0, sum(sizes))]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _gram(rows: Tensor) -> Tensor:
    """Returns B B' in float64, shape `(size, size)`, a few columns at a time: in float32 its rounding errors may be
    larger than the shift that makes the system positive definite."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for part in rows.split(_COLUMNS, dim=1):
        wide = part.double()
        total.addmm_(wide, wide.T)
    return total
