"""Losses of pretext tasks, as pure functions of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather_rows, rank
from .tensors import at_least_float32


def nt_xent_loss(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy of SimCLR (Chen et al., arXiv 2002.05709, equation 1).

    For each embedding z_i of the batch, with z_j the other view of its image and s the cosine similarity,

        l_i = -log( exp(s(z_i, z_j) / temperature) / sum over k != i of exp(s(z_i, z_k) / temperature) ).

    With several processes the negatives come from all of them, while each computes its own rows only: the mean over
    processes is the loss of the global batch, in value and in first and second derivatives.

    Args:
        first (`torch.Tensor`): embeddings of the first views, shape `(batch, dim)`.
        second (`torch.Tensor`): embeddings of the second views, shape `(batch, dim)`.
        temperature (`float`): above 0.

    Returns:
        `torch.Tensor`: mean of l_i over this process's `2 * batch` embeddings, shape `()`.

    Raises:
        `ValueError`: for shapes that do not fit, a temperature that is not positive, or a global batch of one pair.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.losses import nt_xent_loss
    >>> views = torch.eye(2)
    >>> nt_xent_loss(views, views, temperature=0.5)
    tensor(0.2395)
    ```
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"The views have shapes {tuple(first.shape)} and {tuple(second.shape)}; both must be (batch, dim)."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    with torch.autocast(first.device.type, enabled=False):
        return _nt_xent(first, second, temperature)


def _nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    # The loss compares many close numbers; half precision is for the network.
    first, second = at_least_float32(first), at_least_float32(second)
    first, second = _unit_rows(first), _unit_rows(second)
    all_first, all_second = gather_rows(torch.stack([first, second], dim=1)).unbind(1)
    pairs, own_pairs = len(all_first), len(first)
    if pairs < 2:
        raise ValueError(f"The global batch has {pairs} pair; a contrastive loss needs at least 2.")

    keys = torch.cat([all_first, all_second])  # (2 pairs, dim)
    own = rank() * own_pairs + torch.arange(own_pairs, device=first.device)
    own_columns = torch.cat([own, own + pairs])  # where each of this process's embeddings stands among the keys
    positives = torch.cat([own + pairs, own])
    similarities = torch.cat([first, second]) @ keys.T / temperature  # (2 own_pairs, 2 pairs)
    is_itself = torch.zeros_like(similarities, dtype=torch.bool).scatter(1, own_columns[:, None], True)
    return F.cross_entropy(similarities.masked_fill(is_itself, float("-inf")), positives)


def _unit_rows(embeddings: Tensor, smallest: float = 1e-12) -> Tensor:
    """Returns x / max(||x||, smallest) for each row x, as `F.normalize`. Its norm has no second derivative at zero;
    the square does, and below `smallest` the result is linear in x with second derivatives of zero."""
    squares = embeddings.square().sum(dim=1, keepdim=True)  # (batch, 1)
    return embeddings / squares.clamp_min(smallest**2).sqrt()
