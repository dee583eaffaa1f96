"""Whether embeddings collapse: their spread by dimension, and how many dimensions they use."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..distributed import gather_rows
from ..tensors import at_least_float32

# Added to the shares of the singular values, as in the paper of RankMe.
_EPSILON = 1e-7


def embedding_std(embeddings: Tensor) -> Tensor:
    """Returns the standard deviation of each dimension of embeddings of length 1 (Chen and He, arXiv 2011.10566,
    section 4.1). All are 0 when every image has the same embedding; evenly spread ones have about 1 / sqrt(dim).

    Args:
        embeddings (`torch.Tensor`): shape `(rows, dim)`.

    Returns:
        `torch.Tensor`: shape `(dim,)`, of a population (divided by the number of rows).
    """
    return normalize(_checked(embeddings), dim=1).std(dim=0, correction=0)


def effective_rank(embeddings: Tensor) -> Tensor:
    """Returns the effective rank of embeddings: with s the singular values and p = s / sum(s) + 1e-7,
    exp(- sum p log p) (RankMe, Garrido et al., arXiv 2210.02885, equation 1). It is 1 when all embeddings are
    multiples of one vector and `min(rows, dim)` when they use all dimensions alike, so figures compare at equal rows
    only.

    Args:
        embeddings (`torch.Tensor`): shape `(rows, dim)`, as they are: neither centred nor normalised.

    Returns:
        `torch.Tensor`: shape `()`; NaN if a number is not finite. On a GPU the decomposition waits for the device.
    """
    embeddings = _checked(embeddings)
    is_finite = embeddings.isfinite().all()
    values = torch.linalg.svdvals(torch.where(is_finite, embeddings, 0.0))
    shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny) + _EPSILON
    return torch.where(is_finite, (-shares * shares.log()).sum().exp(), torch.nan)


def embedding_figures(embeddings: Tensor) -> dict[str, Tensor]:
    """Returns what shows a collapse, to be logged: `embedding_std`, the mean over dimensions of the standard deviation
    times sqrt(dim), so that 0 is a collapse and about 1 an even spread whatever the width; and `effective_rank`.

    Args:
        embeddings (`torch.Tensor`): of this process, shape `(rows, dim)`; or `(rows, views, dim)`, of which the first
            view counts.

    Returns:
        `dict[str, torch.Tensor]`: tensors of shape `()`, without a graph.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.evaluation.monitors import embedding_figures
    >>> embedding_figures(torch.ones(8, 4))
    {'embedding_std': tensor(0.), 'effective_rank': tensor(1.0000)}
    ```
    """
    with torch.no_grad():
        rows = embeddings if embeddings.ndim == 2 else embeddings[:, 0]
        deviations = embedding_std(rows)
        spread = deviations.mean() * len(deviations) ** 0.5
        return {"embedding_std": spread, "effective_rank": effective_rank(rows)}


class EmbeddingMonitor:
    """Keeps the embeddings of the latest step, so that their figures can be computed when a log is written: a step
    then neither pays for a decomposition nor waits for the device.

    Args:
        max_rows (`int`, *optional*, defaults to 512): how many rows to keep.

    Raises:
        `ValueError`: if `max_rows` is below 2.
    """

    def __init__(self, max_rows: int = 512) -> None:
        if max_rows < 2:
            raise ValueError(f"max_rows is {max_rows}; it must be at least 2.")
        self.max_rows = max_rows
        self._embeddings: Tensor | None = None  # of this process
        self._of_all: Tensor | None = None  # of all processes, where an interrupted run has left them

    def watch(self, embeddings: Tensor) -> None:
        """Takes the embeddings of a step in the place of those before, shape `(rows, dim)` or `(rows, views,
        dim)`."""
        first = embeddings.detach() if embeddings.ndim == 2 else embeddings.detach()[:, 0]
        self._embeddings, self._of_all = first[: self.max_rows].clone(), None  # a view would keep the whole batch

    def watching(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a forward pass that does the same and watches the embeddings of its output, if it has any."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = model(*args, **kwargs)
            if isinstance(embeddings := getattr(outputs, "embeddings", None), Tensor):
                self.watch(embeddings)
            return outputs

        return forward

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what was seen last on all processes, for a resume. Called on every process."""
        embeddings = self._gathered()
        return {} if embeddings is None else {"embeddings": embeddings}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes over what `state_dict` returned."""
        self._embeddings, self._of_all = None, state.get("embeddings")

    def pop_figures(self) -> dict[str, Tensor]:
        """Returns `embedding_figures` of what was seen last on all processes and forgets it; nothing if there was
        nothing. Called on every process."""
        embeddings = self._gathered()
        self._embeddings = self._of_all = None
        return {} if embeddings is None else embedding_figures(embeddings)

    @torch.no_grad()
    def _gathered(self) -> Tensor | None:
        if self._of_all is not None or self._embeddings is None:
            return self._of_all
        return gather_rows(self._embeddings)[: self.max_rows]


def _checked(embeddings: Tensor) -> Tensor:
    if embeddings.ndim != 2 or not embeddings.numel():
        raise ValueError(
            f"The embeddings have shape {tuple(embeddings.shape)}; it must be (rows, dim), neither of them 0."
        )
    return at_least_float32(embeddings)
