"""Losses of pretext tasks, as pure functions of embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import gather_rows, rank
from .tensors import at_least_float32

# Added to variances: paper of VICReg, section 4.1; published code of Barlow Twins (that of torch's batch norm).
_VICREG_EPSILON = 1e-4
_BARLOW_EPSILON = 1e-5


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
    _check_views(first, second)
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be above 0 and finite.")
    with torch.autocast(first.device.type, enabled=False):
        # The loss compares many close numbers; half precision is for the network.
        first, second = at_least_float32(first), at_least_float32(second)
        first, second = unit_vectors(first), unit_vectors(second)
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


def unit_vectors(embeddings: Tensor, smallest: float = 1e-12) -> Tensor:
    """Returns x / max(||x||, smallest) for each vector x along the last dimension, as `F.normalize`. Its norm has no
    second derivative at zero; the square does, and below `smallest` the result is linear in x with second derivatives
    of zero."""
    squares = embeddings.square().sum(dim=-1, keepdim=True)
    return embeddings / squares.clamp_min(smallest**2).sqrt()


def vicreg_loss(
    first: Tensor,
    second: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
) -> Tensor:
    """Loss of variance, invariance and covariance (Bardes et al., arXiv 2105.04906, section 4.1 and algorithm 1).

    For embeddings Z and Z' of n images, of width d, with S_j the standard deviation of column j and C the covariance,

        loss = lambda mean((Z - Z')^2) + mu (v(Z) + v(Z')) + nu (c(Z) + c(Z'))
        v(Z) = mean over j of max(0, 1 - sqrt(S_j^2 + 0.0001)),      c(Z) = 1/d sum over i != j of C_ij^2.

    The invariance term is the mean over images and columns, as in the paper's algorithm and the published code, to
    which the default weights belong; its equation 5 sums over columns. With several processes S and C are those of the
    global batch: the mean over processes is the loss of the global batch, in value and in first and second
    derivatives.

    Args:
        first (`torch.Tensor`): embeddings of the first views, shape `(batch, dim)`.
        second (`torch.Tensor`): embeddings of the second views, shape `(batch, dim)`.
        invariance_weight (`float`, *optional*, defaults to 25.0), variance_weight (`float`, *optional*, defaults to
            25.0), covariance_weight (`float`, *optional*, defaults to 1.0): lambda, mu and nu.

    Returns:
        `torch.Tensor`: shape `()`.

    Raises:
        `ValueError`: for shapes that do not fit, or a global batch of one pair.
    """
    _check_views(first, second)
    with torch.autocast(first.device.type, enabled=False):
        first, second = at_least_float32(first), at_least_float32(second)
        loss = invariance_weight * F.mse_loss(first, second)
        for view in _gather_views(first, second):
            centred = view - view.mean(dim=0)
            covariance = centred.T @ centred / (len(view) - 1)  # (dim, dim)
            variances = covariance.diagonal()
            spread = F.relu(1 - (variances + _VICREG_EPSILON).sqrt()).mean()
            redundancy = (covariance.square().sum() - variances.square().sum()) / view.shape[1]
            loss = loss + variance_weight * spread + covariance_weight * redundancy
        return loss


def barlow_twins_loss(first: Tensor, second: Tensor, *, redundancy_weight: float = 0.0051) -> Tensor:
    """Loss of redundancy reduction (Zbontar et al., arXiv 2103.03230, equations 1 and 2).

    With C_ij the correlation over the batch of column i of the first and column j of the second views' embeddings,

        loss = sum over i of (1 - C_ii)^2 + lambda sum over i != j of C_ij^2.

    As in the published code, 1e-5 is added to each variance. With several processes the correlations are those of the
    global batch: each process computes the same loss, and the mean of gradients over processes is that of the global
    batch, in first and second derivatives.

    Args:
        first (`torch.Tensor`): embeddings of the first views, shape `(batch, dim)`.
        second (`torch.Tensor`): embeddings of the second views, shape `(batch, dim)`.
        redundancy_weight (`float`, *optional*, defaults to 0.0051): lambda.

    Returns:
        `torch.Tensor`: shape `()`.

    Raises:
        `ValueError`: for shapes that do not fit, or a global batch of one pair.
    """
    _check_views(first, second)
    with torch.autocast(first.device.type, enabled=False):
        views = _gather_views(at_least_float32(first), at_least_float32(second))
        normalised = []
        for view in views:
            centred = view - view.mean(dim=0)
            normalised.append(centred / (centred.square().mean(dim=0) + _BARLOW_EPSILON).sqrt())
        correlation = normalised[0].T @ normalised[1] / len(views[0])  # (dim, dim)
        own = correlation.diagonal()
        return (1 - own).square().sum() + redundancy_weight * (correlation.square().sum() - own.square().sum())


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Loss of BYOL (Grill et al., arXiv 2006.07733, equation 2): 2 - 2 cos of each prediction and the target of the
    other view, which is a constant. The mean over both ways, as in BiSSL; BYOL's paper takes their sum.

    Args:
        predictions (`torch.Tensor`): of both views, shape `(batch, 2, dim)`.
        targets (`torch.Tensor`): of both views, shape `(batch, 2, dim)`.

    Returns:
        `torch.Tensor`: mean over this process's pairs and both ways, shape `()`.

    Raises:
        `ValueError`: for shapes that do not fit.
    """
    if predictions.ndim != 3 or predictions.shape[1] != 2 or predictions.shape != targets.shape:
        raise ValueError(
            f"The predictions and targets have shapes {tuple(predictions.shape)} and {tuple(targets.shape)}; both "
            "must be (batch, 2, dim)."
        )
    with torch.autocast(predictions.device.type, enabled=False):
        predictions, targets = at_least_float32(predictions), at_least_float32(targets.detach())
        return byol_loss_of_unit_vectors(unit_vectors(predictions), unit_vectors(targets))


def byol_loss_of_unit_vectors(predictions: Tensor, targets: Tensor) -> Tensor:
    """Returns the loss of BYOL as a function of predictions and targets of length 1, each of shape `(batch, 2, dim)`:
    the mean of their squared distances ||p - t||^2 = 2 - 2 cos, which is convex in both."""
    return (predictions - targets.flip(1)).square().sum(dim=2).mean()


def _check_views(first: Tensor, second: Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"The views have shapes {tuple(first.shape)} and {tuple(second.shape)}; both must be (batch, dim)."
        )


def _gather_views(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
    """Returns the embeddings of the global batch, for statistics over its rows."""
    views = gather_rows(torch.stack([first, second], dim=1)).unbind(1)
    if len(views[0]) < 2:
        raise ValueError(f"The global batch has {len(views[0])} pair; statistics over a batch need at least 2.")
    return views
