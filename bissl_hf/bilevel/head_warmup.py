"""Before the first alternation: the downstream head alone, on the frozen backbone."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..data.alternation import Stream
from ..data.streams import Streams, model_randomness
from ..distributed import average_flat
from ..models.batch_norm import running_statistics
from .level_losses import LevelLosses


def warm_up_head(
    losses: LevelLosses, streams: Streams, optimizer: Optimizer, *, steps: int, show_progress: bool = False
) -> None:
    """Trains phi_D on L_D(theta_D, phi_D), the backbone frozen and in train mode, without clipping.

    Args:
        losses ([`LevelLosses`])
        streams ([`Streams`]): with `Stream.HEAD_WARMUP`.
        optimizer (`torch.optim.Optimizer`): of the head's parameters, at a constant learning rate.
        steps (`int`)
        show_progress (`bool`, *optional*, defaults to `False`)
    """
    model = losses.model
    head = model.head_parameters("upper")
    per_epoch = streams.sources[Stream.HEAD_WARMUP].steps_per_alternation
    model.train()
    with _frozen(model.backbone_parameters("upper")):
        for position in tqdm(range(steps), desc="Head warm-up", disable=not show_progress):
            key = streams.key(Stream.HEAD_WARMUP, *divmod(position, per_epoch))
            batch = streams.read(key)
            with model_randomness(key):
                _, gradient = losses.upper_gradient(model.upper, batch, head)
            gradient = average_flat(gradient, in_place=running_statistics(model.upper))
            for parameter, value in zip(head, gradient, strict=True):
                parameter.grad = value
            losses.loss_scale.step(optimizer)
            optimizer.zero_grad()


@contextmanager
def _frozen(parameters: tuple[Tensor, ...]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
