"""Gradient and curvature of a loss of embeddings, in parts of the batch (after Gao et al., arXiv 2101.06983).

A loss L(z_1, ..., z_K) that compares all rows of a batch with one another cannot be taken of its parts alone. But with
z_k(theta) the embeddings of part k, J_k = d z_k / d theta, and u = d L / d z,

    grad L = sum over k of  J_k^T u_k,
    H v    = sum over k of  (d (J_k^T u_k) / d theta) v + J_k^T r_k    where  r = (d2 L / d z2) J v,

with u and r constants of the derivatives. A first pass without a graph gives z and u, which are small; further passes
hold the graph of one part at a time. Memory does not grow with the batch, and nothing is approximated.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..tensors import Vector, accumulate, fill_missing
from .curvature import Curvature

Embed = Callable[[], Tensor]


def embedding_gradients(embed_parts: Sequence[Embed], loss_fn: Callable[[Tensor], Tensor]) -> tuple[Tensor, Vector]:
    """Returns a loss of embeddings and its gradient in them, without a graph of what made them.

    Args:
        embed_parts (`Sequence[Callable]`): each returns the embeddings of one part, shape `(rows, ...)`, without side
            effects. Whoever differentiates them later must give them the random state that they find here.
        loss_fn (`Callable`): the loss, of shape `()`, of the embeddings of all parts one below the other.

    Returns:
        `tuple[torch.Tensor, tuple[torch.Tensor, ...]]`: the loss, and u_k for each part.
    """
    rows, sizes = _embed(embed_parts)  # (rows of all parts, dims)
    loss = loss_fn(rows)  # ()
    (gradient,) = torch.autograd.grad(loss, rows)
    return loss.detach(), gradient.split(sizes)


def _embed(embed_parts: Sequence[Embed]) -> tuple[Tensor, list[int]]:
    """Returns the embeddings of all parts as one leaf, and the number of rows of each part."""
    with torch.no_grad():
        embeddings = [embed() for embed in embed_parts]
    return torch.cat(embeddings).requires_grad_(), [len(part) for part in embeddings]


class EmbeddingCurvature(Curvature):
    """The Hessian of a loss of embeddings, one part of the batch at a time. A product takes two passes over the parts.

    Args:
        embed_parts (`Sequence[Callable]`), loss_fn (`Callable`): see [`embedding_gradients`].
        parameters (`Sequence[torch.Tensor]`), reduce (`Callable`, *optional*): see [`Curvature`].

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.bilevel.gradient_cache import EmbeddingCurvature
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> parts = [lambda: x[None], lambda: 2 * x[None]]
    >>> EmbeddingCurvature(parts, lambda z: z.prod(0).sum(), [x])((torch.tensor([1.0, 1.0]),))
    (tensor([4., 4.]),)
    ```
    """

    def __init__(
        self,
        embed_parts: Sequence[Embed],
        loss_fn: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        *,
        reduce: Callable[[Vector], Vector] | None = None,
    ) -> None:
        super().__init__(
            lambda: loss_fn(torch.cat([embed() for embed in embed_parts])),
            parameters,
            mode="recompute",
            reduce=reduce,
        )
        self._embed_parts = tuple(embed_parts)
        self._loss_of_rows = loss_fn
        # z, u with the graph of u in z, and the rows of each part
        self._rows: tuple[Tensor, Tensor, list[int]] | None = None

    def _linearise(self) -> Vector:
        """Returns the gradient, without a graph."""
        _, row_gradient, sizes = self._embeddings()
        gradient = self._pull_back(row_gradient.detach().split(sizes))
        self._keep_gradient(gradient)
        return gradient

    def _product(self, vector: Sequence[Tensor]) -> Vector:
        rows, row_gradient, sizes = self._embeddings()
        product = self._zeros()
        tangents = []
        with self._evaluating():
            for embed, constant in zip(self._embed_parts, row_gradient.detach().split(sizes), strict=True):
                weights = constant.clone().requires_grad_()  # w = u_k, (rows of the part, dims)
                pulled = torch.autograd.grad(
                    embed(), self.parameters, weights, create_graph=True, allow_unused=True, materialize_grads=True
                )
                # d <J^T w, v> / d w = J v, and in theta, at w = u, the first term of H v.
                outputs = [(g, v) for g, v in zip(pulled, vector, strict=True) if g.requires_grad]
                tangent, *second = torch.autograd.grad(
                    [g for g, _ in outputs], (weights, *self.parameters), [v for _, v in outputs], allow_unused=True
                )
                tangents.append(tangent)
                accumulate(product, fill_missing(second, self.parameters))
        if not row_gradient.requires_grad:  # a loss that is linear in the embeddings
            return product
        (row_product,) = torch.autograd.grad(row_gradient, rows, torch.cat(tangents), retain_graph=True)
        accumulate(product, self._pull_back(row_product.split(sizes)))
        return product

    def _embeddings(self) -> tuple[Tensor, Tensor, list[int]]:
        if self._rows is None:
            with self._evaluating():
                rows, sizes = _embed(self._embed_parts)
                (row_gradient,) = torch.autograd.grad(self._loss_of_rows(rows), rows, create_graph=True)
            self._rows = rows, row_gradient, sizes
        return self._rows

    def _pull_back(self, weights: Iterable[Tensor]) -> Vector:
        """Returns the sum over parts of J_k^T w_k."""
        total = self._zeros()
        with self._evaluating():
            for embed, part in zip(self._embed_parts, weights, strict=True):
                found = torch.autograd.grad(embed(), self.parameters, part, allow_unused=True)
                accumulate(total, fill_missing(found, self.parameters))
        return total
