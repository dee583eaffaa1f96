"""The layout in memory of images and of the weights of convolutions."""

import torch
from torch import nn


@torch.no_grad()
def to_channels_last(model: nn.Module) -> None:
    """Lays the weights of two-dimensional convolutions out with their channels last. Such a convolution does the same
    with its images, whatever they come in, and what follows keeps it. Values, shapes and names stay.

    Args:
        model (`torch.nn.Module`): changed in place; parameters stay the same objects.
    """
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
