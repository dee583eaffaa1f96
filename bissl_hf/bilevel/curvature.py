"""The curvature of the lower level: the Hessian of a lower loss in the shared backbone, as an operator on vectors.

Losses are closures; nothing here knows a model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..tensors import Vector, accumulate, check_same_structure, fill_missing
from .twice import TwiceDifferentiable

CurvatureMode = Literal["cached", "recompute"]
LossFunction = Callable[[], Tensor]
CURVATURE_MODES: tuple[str, ...] = ("cached", "recompute")


class Curvature:
    """The Hessian H of a lower loss in some parameters, as an operator on vectors: `curvature(v)` is H v.

    The loss is differentiated once, and every product is one more backward pass through that gradient. Attention runs
    in the math kernel, the only one that can be differentiated twice. Each evaluation of the loss starts from torch's
    random state as found at construction, so dropout draws the same masks in every product.

    Args:
        loss_fn (`Callable` or `Sequence[Callable]`): returns the lower loss, a tensor of shape `()`; or several,
            called in this order, whose values add up to it. They must not have side effects: in particular they must
            leave the running statistics of batch norm alone (see [`BiSSLModel.without_side_effects`]).
        parameters (`Sequence[torch.Tensor]`): the leaves to differentiate in. Everything else is a constant.
        mode (`str`, *optional*, defaults to `"cached"`): `"cached"` keeps the graph of the gradient for all products;
            `"recompute"` builds it anew for each, term by term, which takes longer, holds no memory in between and
            that of one term at a time.
        reduce (`Callable`, *optional*): averages a vector over processes.

    Raises:
        `ValueError`: for an unknown mode, no loss, or a parameter list that is empty or does not require gradients.
        `RuntimeError`: from a product or the gradient, if the parameters have changed since construction.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.bilevel.curvature import Curvature
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> Curvature(lambda: (x**3).sum(), [x])((torch.tensor([1.0, 0.0]),))
    (tensor([6., 0.]),)
    ```
    """

    def __init__(
        self,
        loss_fn: LossFunction | Sequence[LossFunction],
        parameters: Sequence[Tensor],
        *,
        mode: str = "cached",
        reduce: Callable[[Vector], Vector] | None = None,
    ) -> None:
        if mode not in CURVATURE_MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(CURVATURE_MODES)}.")
        self.parameters = tuple(parameters)
        if not self.parameters:
            raise ValueError("parameters is empty; the curvature needs at least one tensor to differentiate in.")
        frozen = sum(not parameter.requires_grad for parameter in self.parameters)
        if frozen:
            raise ValueError(
                f"{frozen} of {len(self.parameters)} parameters do not require gradients; leave them out."
            )
        self.mode = mode
        self._terms: tuple[LossFunction, ...] = (loss_fn,) if callable(loss_fn) else tuple(loss_fn)
        if not self._terms:
            raise ValueError("loss_fn is empty; the curvature needs at least one term of the loss.")
        self._reduce = reduce
        self._versions = self._current_versions()
        self._devices = sorted({p.device.index for p in self.parameters if p.device.type == "cuda"})
        with self._forked_random_state():
            self._random_state = (torch.get_rng_state(), [torch.cuda.get_rng_state(i) for i in self._devices])
        self._graph: Vector | None = None
        self._gradient: Vector | None = None

    @property
    def gradient(self) -> Vector:
        """The gradient of the lower loss in the parameters, averaged over processes and without a graph."""
        self.check_unchanged()
        if self._gradient is None:
            self._linearise()
        if self._gradient is None:
            raise RuntimeError("The curvature was not linearised.")
        return self._gradient

    def __call__(self, vector: Sequence[Tensor]) -> Vector:
        """Returns H times `vector`, averaged over processes."""
        check_same_structure(vector, self.parameters, names=("the vector", "the parameters"))
        self.check_unchanged()
        product = self._product(vector)
        return self._reduce(product) if self._reduce else product

    def _product(self, vector: Sequence[Tensor]) -> Vector:
        """Returns H times `vector` for the loss of this process."""
        if self.mode == "cached":
            graph = self._linearise() if self._graph is None else self._graph
            return self._differentiate(graph, vector, retain_graph=True)
        product, gradient = self._zeros(), self._zeros() if self._gradient is None else None
        with self._evaluating():
            for term in self._terms:
                graph = self._gradient_of(term)
                if gradient is not None:
                    accumulate(gradient, [g.detach() for g in graph])
                accumulate(product, self._differentiate(graph, vector))
                del graph  # before the next term makes its own
        if gradient is not None:
            self._keep_gradient(gradient)
        return product

    def _differentiate(self, graph: Vector, vector: Sequence[Tensor], *, retain_graph: bool = False) -> Vector:
        """Returns  d <g, v> / d theta  for a gradient g and a constant v: H v."""
        # A gradient that is a constant of the parameters (a linear loss) has no graph, and no curvature.
        pairs = [(g, v.to(g.dtype)) for g, v in zip(graph, vector, strict=True) if g.requires_grad]
        if not pairs:
            return self._zeros()
        outputs, weights = zip(*pairs, strict=True)
        # The sum over tensors of <g, v> has shape (); its gradient in theta is H v, one tensor per parameter.
        found = torch.autograd.grad(outputs, self.parameters, weights, retain_graph=retain_graph, allow_unused=True)
        return fill_missing(found, self.parameters)

    def _linearise(self) -> Vector:
        """Returns the gradient: in mode `cached` with its graph, which is kept, else without one."""
        cached = self.mode == "cached"
        with self._evaluating():
            if cached:
                gradient = self._gradient_of(lambda: _sum_of(self._terms))
            else:
                gradient = self._zeros()
                for term in self._terms:
                    accumulate(gradient, self._gradient_of(term, create_graph=False))
        self._keep_gradient(gradient)
        if cached:
            self._graph = gradient
        return gradient

    def _gradient_of(self, loss_fn: LossFunction, *, create_graph: bool = True) -> Vector:
        found = torch.autograd.grad(loss_fn(), self.parameters, create_graph=create_graph, allow_unused=True)
        return fill_missing(found, self.parameters)

    def _zeros(self) -> Vector:
        return tuple(torch.zeros_like(parameter) for parameter in self.parameters)

    def _keep_gradient(self, gradient: Vector) -> None:
        gradient = tuple(g.detach() for g in gradient)
        self._gradient = self._reduce(gradient) if self._reduce else gradient

    def check_unchanged(self) -> None:
        """Raises a `RuntimeError` if the parameters have changed since construction."""
        if self._current_versions() != self._versions:
            raise RuntimeError(
                "The parameters have changed since this curvature was built, so its products would mix two states. "
                "Build a new Curvature after each update of the lower level."
            )

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(parameter._version for parameter in self.parameters)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """What every evaluation of the loss runs in: the same random state, and kernels with second derivatives."""
        with self._forked_random_state(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), TwiceDifferentiable():
            torch.set_rng_state(self._random_state[0])
            for index, state in zip(self._devices, self._random_state[1], strict=True):
                torch.cuda.set_rng_state(state, index)
            yield

    @contextmanager
    def _forked_random_state(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=self._devices):
            yield


def _sum_of(terms: Sequence[LossFunction]) -> Tensor:
    """Calls functions in their order and returns the sum of what they return."""
    values = [term() for term in terms]
    return values[0] if len(values) == 1 else torch.stack(values).sum()
