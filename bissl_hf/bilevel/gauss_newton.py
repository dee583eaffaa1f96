"""The Gauss-Newton matrix of the lower loss: a curvature that cannot be indefinite, without a second-order graph.

With the loss a convex function of outputs o(theta), J = d o / d theta and S the Hessian of the loss in o,

    G = J' S J,    where the Hessian is  H = J' S J + sum over i of (d loss / d o_i) (d2 o_i / d theta2).

J v is taken by forward-mode differentiation, S by a second derivative in the outputs alone, and J' by one backward
pass. Where the outputs compare all rows of a batch (similarities), o = c(z) of rows z that can be made in parts:
J = C J_z, with C the small derivative of c.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from transformers.utils import logging

from ..tensors import Vector, accumulate, dot, fill_missing, norm
from .curvature import Curvature

logger = logging.get_logger(__name__)

OutputsFunction = Callable[[], Tensor]


class GaussNewton(Curvature):
    """The Gauss-Newton matrix of a loss in some parameters, as an operator on vectors, in the place of [`Curvature`].

    Its products cost about three quarters of the Hessian's and hold the graph of one forward pass; in parts, that of
    one part. An operator without a forward rule has J v taken by a second backward pass instead, which is said once.

    Args:
        outputs_fn (`Callable` or `Sequence[Callable]`): returns the outputs, differentiable in the parameters and
            without side effects; or several, which return those of one part of the batch each, to be put one below
            the other.
        loss_fn (`Callable`): the loss, of shape `()`, of these outputs; it must be convex in them for G to be
            positive semidefinite.
        parameters (`Sequence[torch.Tensor]`), reduce (`Callable`, *optional*): see [`Curvature`].
        mode (`str`, *optional*, defaults to `"cached"`): `"cached"` keeps the graph of the forward pass for all
            products; `"recompute"` builds it anew for each, part by part.
        join (`Callable`, *optional*): makes the outputs from the rows that `outputs_fn` returns, where they compare
            all rows of the batch. It holds no parameters.

    Raises:
        `ValueError`, `RuntimeError`: as [`Curvature`] does.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.bilevel.gauss_newton import GaussNewton
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> GaussNewton(lambda: x**2, lambda outputs: (outputs**2).sum(), [x])((torch.tensor([1.0, 0.0]),))
    (tensor([8., 0.]),)
    ```
    """

    def __init__(
        self,
        outputs_fn: OutputsFunction | Sequence[OutputsFunction],
        loss_fn: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        *,
        mode: str = "cached",
        join: Callable[[Tensor], Tensor] | None = None,
        reduce: Callable[[Vector], Vector] | None = None,
    ) -> None:
        super().__init__(outputs_fn, parameters, mode=mode, reduce=reduce)
        self._loss_of_outputs = loss_fn
        self._join = join
        self._loss_graph: _LossGraph | None = None
        self._rows: list[Tensor] | None = None  # of each part, with their graph, in mode `cached`
        # Whether J v is taken in forward mode: not known before the first product.
        self._forward_mode: bool | None = None

    def _linearise(self) -> Vector:
        """Returns the gradient, without a graph."""
        loss = self._graph_of_loss()
        gradient = self._pull_back(loss, self._pull_back_outputs(loss, loss.gradient.detach()))
        self._keep_gradient(gradient)
        return gradient

    def _product(self, vector: Sequence[Tensor]) -> Vector:
        loss = self._graph_of_loss()
        if not loss.gradient.requires_grad:  # a loss that is linear in its outputs
            return self._zeros()
        unproven = self._forward_mode is None
        product, inner = self._pull_back_curved(loss, self._push_forward(loss, vector))
        if unproven and self._forward_mode and not self._agree(inner, product, vector):
            self._leave_forward_mode("a parameter reaches an operator past torch's functions")
            product, _ = self._pull_back_curved(loss, self._push_forward(loss, vector))
        return product

    def _pull_back_curved(self, loss: "_LossGraph", tangents: Tensor) -> tuple[Vector, Tensor]:
        """Returns  J' S o'  for the tangents z' of the rows and o' = C z' of the outputs, and  <o', S o'>."""
        along = self._push_through_join(loss, tangents)
        # S o', in the shape of the outputs: the gradient of <dL/do, o'> in o
        (weights,) = torch.autograd.grad(loss.gradient, loss.outputs, along, retain_graph=True)
        return self._pull_back(loss, self._pull_back_outputs(loss, weights)), (weights * along).sum()

    def _agree(self, inner: Tensor, product: Vector, vector: Sequence[Tensor]) -> bool:
        """Whether  <J v, S J v> = <v, G v>  over all processes, as for any J and its transpose."""
        pair: Vector = (torch.stack([inner.double(), dot(product, vector).double()]),)
        ours, theirs = (self._reduce(pair) if self._reduce else pair)[0].tolist()
        if ours == theirs == 0:  # no tangent at all, unless there is none to have
            return not any(bool(part.any()) for part in vector)
        widest = all(part.dtype == torch.float64 for part in product)
        rounding = float(norm(product) * norm(vector)) * torch.finfo(product[0].dtype).eps
        return abs(ours - theirs) <= (1e-6 if widest else 0.02) * max(abs(ours), abs(theirs)) + rounding

    def _graph_of_loss(self) -> "_LossGraph":
        if self._loss_graph is None:
            with self._evaluating(), torch.set_grad_enabled(self.mode == "cached"):
                parts = [part() for part in self._terms]
            self._rows = parts if self.mode == "cached" else None
            # z: the rows of all parts, (rows, ...); o = C z: what the loss is convex in, for NT-Xent the logits
            rows = torch.cat([part.detach() for part in parts]).requires_grad_()
            with self._evaluating():
                joined = rows if self._join is None else self._join(rows)
                outputs = joined.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self._loss_of_outputs(outputs), outputs, create_graph=True)
            self._loss_graph = _LossGraph(rows, [len(part) for part in parts], joined, outputs, gradient)
        return self._loss_graph

    # J, J' and C

    def _pull_back_outputs(self, loss: "_LossGraph", weights: Tensor) -> Tensor:
        """Returns C' w."""
        if self._join is None:
            return weights
        return torch.autograd.grad(loss.joined, loss.rows, weights, retain_graph=True)[0]

    def _pull_back(self, loss: "_LossGraph", weights: Tensor) -> Vector:
        """Returns J_z' w."""
        total, shares = self._zeros(), weights.split(loss.sizes)
        if self._rows is not None:
            pairs = [(rows, w) for rows, w in zip(self._rows, shares, strict=True) if rows.requires_grad]
            self._accumulate_gradients(total, pairs, retain_graph=True)
            return total
        with self._evaluating():
            for part, share in zip(self._terms, shares, strict=True):
                self._accumulate_gradients(total, [(part(), share)])
        return total

    def _accumulate_gradients(self, total: Vector, pairs: list[tuple[Tensor, Tensor]], **settings: bool) -> None:
        if pairs:
            outputs, weights = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, self.parameters, weights, allow_unused=True, **settings)
            accumulate(total, fill_missing(found, self.parameters))

    def _push_forward(self, loss: "_LossGraph", vector: Sequence[Tensor]) -> Tensor:
        """Returns J_z v."""
        if self._forward_mode is not False:
            try:
                tangents = self._push_forward_once(vector)
            except NotImplementedError as error:
                self._leave_forward_mode(str(error).splitlines()[0])
            else:
                self._forward_mode = True
                return tangents
        return self._push_forward_by_two_backward_passes(loss, vector)

    def _push_forward_once(self, vector: Sequence[Tensor]) -> Tensor:
        tangents = []
        with self._evaluating(), torch.no_grad(), forward_ad.dual_level():
            duals = {
                id(parameter): forward_ad.make_dual(parameter.detach(), direction.to(parameter.dtype))
                for parameter, direction in zip(self.parameters, vector, strict=True)
            }
            with _Substitute(duals):
                for part in self._terms:
                    tangents.append(_tangent_of(part()))  # (rows of the part, ...)
        return torch.cat(tangents)

    def _push_forward_by_two_backward_passes(self, loss: "_LossGraph", vector: Sequence[Tensor]) -> Tensor:
        """Returns J_z v as the derivative of  <J_z' w, v>  in w."""
        tangents = []
        with self._evaluating():
            for part, start in zip(self._terms, torch.zeros_like(loss.rows).split(loss.sizes), strict=True):
                weights = start.clone().requires_grad_()
                pulled = torch.autograd.grad(
                    part(), self.parameters, weights, create_graph=True, allow_unused=True, materialize_grads=True
                )
                outputs, directions = zip(
                    *((g, v.to(g.dtype)) for g, v in zip(pulled, vector, strict=True) if g.requires_grad), strict=True
                )
                tangents.append(torch.autograd.grad(outputs, weights, directions)[0])
        return torch.cat(tangents)

    def _push_through_join(self, loss: "_LossGraph", tangents: Tensor) -> Tensor:
        """Returns C t."""
        if self._join is None:
            return tangents
        with self._evaluating(), torch.no_grad(), forward_ad.dual_level():
            return _tangent_of(self._join(forward_ad.make_dual(loss.rows.detach(), tangents)))

    def _leave_forward_mode(self, reason: str) -> None:
        self._forward_mode = False
        logger.warning_once(
            f"Gauss-Newton products are taken without forward-mode differentiation, which costs more time: {reason}."
        )


class _LossGraph(NamedTuple):
    """The loss as a function of the rows z, without the graph of what made them."""

    rows: Tensor
    sizes: list[int]  # rows of each part
    joined: Tensor  # o with its graph in z
    outputs: Tensor  # o as a leaf
    gradient: Tensor  # d loss / d o with its graph in o


def _tangent_of(dual: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(dual)
    return torch.zeros_like(primal) if tangent is None else tangent.clone()


def _in_one_precision(dual: Tensor) -> Tensor:
    """Returns a number with its tangent in its own dtype. The forward rules of operators that mix dtypes (batch norm
    of half precision with parameters in float32, torch 2.13) leave it in the wider one, which the next one refuses."""
    primal, tangent = forward_ad.unpack_dual(dual)
    if tangent is None or tangent.dtype == primal.dtype:
        return dual
    return forward_ad.make_dual(primal, tangent.to(primal.dtype))


class _Substitute(TorchFunctionMode):
    """Puts dual numbers in the place of parameters in the arguments of torch's functions."""

    def __init__(self, tensors: dict[int, Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, self._swap, (args, kwargs or {}))
        found = func(*args, **kwargs)
        return _in_one_precision(found) if isinstance(found, Tensor) and found.is_floating_point() else found

    def _swap(self, tensor: Tensor) -> Tensor:
        return self._tensors.get(id(tensor), tensor)
