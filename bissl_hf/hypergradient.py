"""The curvature of the lower level and the implicit gradient of the upper one. Losses are closures; no Trainer here.

With the lower level stationary in theta_P, phi_P held fixed (paper, section 3 and appendix),

    grad L_P(theta_P, phi_P) + lambda (theta_P - theta_D) = 0,

differentiating in theta_D gives the implicit Jacobian  d theta_P* / d theta_D = (I + H / lambda)^-1,  where
H = d2 L_P / d theta_P^2 leaves the proximal term out. It is symmetric, so the upper level's gradient reaches theta_D
as

    x = (I + H / (lambda + delta))^-1 grad_theta L_D(theta_P, phi_D),   with the damping delta for the solve alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .linear_solve import SolveInfo, SolveStatus, conjugate_gradient
from .recycling import Directions, recycled_conjugate_gradient
from .tensors import Vector, accumulate, add_scaled, check_same_structure, fill_missing

CurvatureMode = Literal["cached", "recompute"]
LossFunction = Callable[[], Tensor]
CURVATURE_MODES: tuple[str, ...] = ("cached", "recompute")
SOLVERS: tuple[str, ...] = ("cg", "recycled", "blockwise_cg", "identity")


class Curvature:
    """The Hessian H of a lower loss in some parameters, as an operator on vectors: `curvature(v)` is H v.

    The loss is differentiated once, and every product is one more backward pass through that gradient. Attention runs
    in the math kernel, the only one that can be differentiated twice. Each evaluation of the loss starts from torch's
    random state as found at construction, so dropout draws the same masks in every product.

    Args:
        loss_fn (`Callable` or `Sequence[Callable]`): returns the lower loss, a tensor of shape `()`; or several,
            called in this order, whose values add up to it. They must not have side effects: in particular they must
            leave the running statistics of batch norm alone (see [`BiSSLModel.pure`]).
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
    >>> from bissl_hf.hypergradient import Curvature
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
        with self._forked_random_state(), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
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
