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
    return nt_xent_from_similarities(pair_similarities(first, second, temperature=temperature))


def pair_similarities(first: Tensor, second: Tensor, *, temperature: float) -> Tensor:
    """Returns the logits of [`nt_xent_loss`], in which it is convex: s(z_i, z_k) / temperature of this process's
    embeddings i and those of all processes, minus infinity for k = i.

    Args:
        first, second (`torch.Tensor`), temperature (`float`): see [`nt_xent_loss`].

    Returns:
        `torch.Tensor`: shape `(2 * batch, 2 * global batch)`; first views before second ones, in rows and in columns.

    Raises:
        `ValueError`: as [`nt_xent_loss`].
    """
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"The views have shapes {tuple(first.shape)} and {tuple(second.shape)}; both must be (batch, dim)."
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0.")
    with torch.autocast(first.device.type, enabled=False):
        # The loss compares many close numbers; half precision is for the network.
        first, second = at_least_float32(first), at_least_float32(second)
        first, second = _unit_rows(first), _unit_rows(second)
        all_first, all_second = gather_rows(torch.stack([first, second], dim=1)).unbind(1)
        pairs = len(all_first)
        if pairs < 2:
            raise ValueError(f"The global batch has {pairs} pair; a contrastive loss needs at least 2.")
        keys = torch.cat([all_first, all_second])  # (2 pairs, dim)
        similarities = torch.cat([first, second]) @ keys.T / temperature
        own_columns = _own_columns(len(first), pairs, first.device)
        is_itself = torch.zeros_like(similarities, dtype=torch.bool).scatter(1, own_columns[:, None], True)
        return similarities.masked_fill(is_itself, float("-inf"))


def nt_xent_from_similarities(similarities: Tensor) -> Tensor:
    """Returns the NT-Xent loss of the logits of [`pair_similarities`], shape `()`."""
    pairs, own_pairs = similarities.shape[1] // 2, similarities.shape[0] // 2
    own_columns = _own_columns(own_pairs, pairs, similarities.device)
    positives = (own_columns + pairs) % (2 * pairs)
    with torch.autocast(similarities.device.type, enabled=False):
        return F.cross_entropy(similarities, positives)


def _own_columns(own_pairs: int, pairs: int, device: torch.device) -> Tensor:
    """Where each of this process's embeddings stands among those of all processes."""
    own = rank() * own_pairs + torch.arange(own_pairs, device=device)
    return torch.cat([own, own + pairs])


def _unit_rows(embeddings: Tensor, smallest: float = 1e-12) -> Tensor:
    """Returns x / max(||x||, smallest) for each row x, as `F.normalize`. Its norm has no second derivative at zero;
    the square does, and below `smallest` the result is linear in x with second derivatives of zero."""
    squares = embeddings.square().sum(dim=1, keepdim=True)  # (batch, 1)
    return embeddings / squares.clamp_min(smallest**2).sqrt()
