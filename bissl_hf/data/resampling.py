"""Pillow's filters for resizing, as matrices: for many crops at once, and on any device."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.image_utils import PILImageResampling


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    # Keys' cubic with a = -0.5.
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _lanczos(distance: Tensor) -> Tensor:
    return torch.where(distance < 3, distance.sinc() * (distance / 3).sinc(), 0.0)


# By the numbers that Pillow and the image processors of transformers give the filters.
FILTERS: dict[int, Callable[[Tensor], Tensor]] = {
    PILImageResampling.LANCZOS: _lanczos,
    PILImageResampling.BILINEAR: _bilinear,
    PILImageResampling.BICUBIC: _bicubic,
}

FILTER_NAMES = {PILImageResampling(number).name.lower(): int(number) for number in sorted(FILTERS)}


def check_resample(resample: int) -> None:
    """Refuses a filter that is not known.

    Raises:
        `ValueError`: with those that are.
    """
    if resample not in FILTERS:
        known = ", ".join(f"{number} ({name})" for name, number in FILTER_NAMES.items())
        raise ValueError(f"`resample` is {resample!r}; it must be the number of a filter of Pillow: {known}.")


def resampling_weights(
    start: Tensor, stop: Tensor, length: int, size: int, resample: int = PILImageResampling.BICUBIC
) -> Tensor:
    """Returns, for each item of a batch, the matrix that resizes one axis of a crop as Pillow does.

    Multiplying the matrix to an axis of `length` pixels gives the pixels from `start` to `stop` in `size` pixels. The
    filter is stretched by the scale where the crop shrinks, and cut at the crop's borders.

    Args:
        start (`torch.Tensor`): first pixel of each crop, float, shape (batch,).
        stop (`torch.Tensor`): the pixel after the last one of each crop, float, shape (batch,).
        length (`int`): pixels of the axis.
        size (`int`): pixels of the result.
        resample (`int`, *optional*, defaults to 3): number of Pillow's filter, bicubic by default.

    Returns:
        `torch.Tensor`: weights, shape (batch, size, length); each row sums to 1.
    """
    scale = ((stop - start) / size)[:, None, None]
    inputs = torch.arange(length, device=start.device, dtype=start.dtype)
    outputs = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]
    centers = start[:, None, None] + (outputs + 0.5) * scale
    weights = FILTERS[resample](((inputs + 0.5 - centers) / scale.clamp(min=1)).abs())
    weights = weights * ((inputs >= start[:, None, None]) & (inputs < stop[:, None, None]))
    return weights / weights.sum(dim=-1, keepdim=True)
