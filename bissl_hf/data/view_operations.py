"""Random operations on batches of images, in two parts: what is random is drawn on the CPU, so that views are the same
on each device; then it travels to the device in one copy, for which the host does not wait.

Draws and colour functions are kornia's. Its modules as a whole read draws on the device, or copy each for itself.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import kornia.augmentation as K
import torch
from kornia import enhance
from kornia.color import rgb_to_grayscale
from kornia.filters import filter2d_separable, get_gaussian_kernel1d
from torch import Tensor

from .batches import copy_without_waiting
from .resampling import resampling_weights

# Strengths of brightness, contrast, saturation and hue, and the range of the blur, as in the paper.
_JITTER = (0.4, 0.4, 0.2, 0.1)
_BLUR_SIGMA = (0.1, 2.0)


@dataclass(frozen=True)
class Drawn:
    """An operation with its random numbers.

    Args:
        apply (`Callable`): `apply(images, *draws) -> images`, float images in [0, 1] of shape (batch, 3, side, side).
        draws (`tuple[torch.Tensor, ...]`): float32 or bool, one item per image in the first dimension.
    """

    apply: Callable[..., Tensor]
    draws: tuple[Tensor, ...]


class Operation(Protocol):
    """Draws the random numbers of an operation, on the CPU, for images of a shape."""

    def draw(self, shape: torch.Size) -> Drawn: ...


def place(operations: Sequence[Drawn], device: torch.device) -> list[Drawn]:
    """Moves the draws of some operations to a device, in one copy."""
    draws = [draw for operation in operations for draw in operation.draws]
    flat = copy_without_waiting(torch.cat([draw.reshape(-1).float() for draw in draws]), device)
    parts = iter(flat.split([draw.numel() for draw in draws]))
    return [
        replace(operation, draws=tuple(next(parts).view(draw.shape) for draw in operation.draws))
        for operation in operations
    ]


class RandomCrop:
    """Random resized crops with random horizontal flips; uint8 in, float32 in [0, 1] out.

    Args:
        size (`int`): side of the crops.
        scale, ratio (`tuple[float, float]`): ranges of the share of the area, and of width by height.
        horizontal_flip (`float`): probability of a flip.
        resample (`int`): number of Pillow's filter.

    Attributes:
        settings (`dict`): what it was made with, as JSON can hold it.

    Raises:
        `ValueError`: for a range or probability that is not allowed.
    """

    def __init__(
        self,
        size: int,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        horizontal_flip: float,
        resample: int,
    ) -> None:
        check_probabilities(horizontal_flip=horizontal_flip)
        for argument, (low, high), limit in (("crop_scale", scale, 1.0), ("crop_ratio", ratio, float("inf"))):
            if not 0 < low <= high <= limit or high == float("inf"):
                allowed = "at most 1" if limit == 1 else "finite"
                raise ValueError(
                    f"`{argument}` is {(low, high)}; it must be two numbers above 0 and {allowed}, the lower one "
                    "first."
                )
        self._size = size
        self._resample = resample
        self._flip = horizontal_flip
        self._boxes = K.RandomResizedCrop((size, size), scale=scale, ratio=ratio)
        self.settings = {"crop_scale": [*scale], "crop_ratio": [*ratio], "horizontal_flip": horizontal_flip}

    def draw(self, shape: torch.Size) -> Drawn:
        """Draws one box per image, and whether it is flipped."""
        # Four corners (x, y) of each box, the last pixel included, from the top left clockwise: (batch, 4, 2).
        corners = self._boxes.generate_parameters(shape)["src"]
        if self._flip == 0:
            return Drawn(self._apply, (corners,))
        return Drawn(self._apply, (corners, torch.rand(shape[0]) < self._flip))

    def _apply(self, images: Tensor, corners: Tensor, flipped: Tensor | None = None) -> Tensor:
        batch, channels, height, width = images.shape
        (left, top), (right, bottom) = corners[:, 0].unbind(1), (corners[:, 2] + 1).unbind(1)
        columns = resampling_weights(left, right, width, self._size, self._resample)
        if flipped is not None:
            columns = torch.where(flipped[:, None, None] > 0, columns.flip(1), columns)
        rows = resampling_weights(top, bottom, height, self._size, self._resample)
        levels = images.float().view(batch, channels * height, width)
        narrowed = (levels @ columns.mT).view(batch, channels, height, self._size)
        # Some filters overshoot at edges.
        return (rows[:, None] @ narrowed / 255).clamp(0, 1)


class ColorJitter:
    """Brightness, contrast, saturation and hue, in an order that is drawn per batch.

    Args:
        probability (`float`): of each image to be changed.
    """

    _STEPS: tuple[tuple[str, Callable[[Tensor, Tensor], Tensor]], ...] = (
        ("brightness_factor", enhance.adjust_brightness_accumulative),
        ("contrast_factor", enhance.adjust_contrast_with_mean_subtraction),
        ("saturation_factor", enhance.adjust_saturation_with_gray_subtraction),
        ("hue_factor", lambda images, turns: enhance.adjust_hue(images, turns * 2 * math.pi)),
    )

    def __init__(self, probability: float) -> None:
        self._drawing = K.ColorJitter(*_JITTER, p=probability)

    def draw(self, shape: torch.Size) -> Drawn:
        """Draws which images are changed, the factors, and the order."""
        drawn = self._drawing.forward_parameters(shape)
        steps = [self._STEPS[index] for index in drawn["order"].tolist()]

        def apply(images: Tensor, chosen: Tensor, *factors: Tensor) -> Tensor:
            changed = images
            for (_, function), factor in zip(steps, factors, strict=True):
                changed = function(changed, factor)
            return where_chosen(chosen, changed.clamp(0, 1), images)

        return Drawn(apply, (drawn["batch_prob"], *(drawn[name] for name, _ in steps)))


class Grayscale:
    """The luminance in all channels.

    Args:
        probability (`float`): of each image to be changed.
    """

    def __init__(self, probability: float) -> None:
        self._drawing = K.RandomGrayscale(p=probability)

    def draw(self, shape: torch.Size) -> Drawn:
        """Draws which images are changed."""
        return Drawn(self._apply, (self._drawing.forward_parameters(shape)["batch_prob"],))

    def _apply(self, images: Tensor, chosen: Tensor) -> Tensor:
        return where_chosen(chosen, rgb_to_grayscale(images), images)


class GaussianBlur:
    """A Gaussian blur of 0.1 to 2 pixels.

    Args:
        probability (`float`): of each image to be changed.
        side (`int`): of the kernel, odd.
    """

    def __init__(self, probability: float, side: int) -> None:
        self.side = side
        self._drawing = K.RandomGaussianBlur((side, side), _BLUR_SIGMA, p=probability)

    def draw(self, shape: torch.Size) -> Drawn:
        """Draws which images are changed, and by how much."""
        drawn = self._drawing.forward_parameters(shape)
        return Drawn(self._apply, (drawn["batch_prob"], drawn["sigma"]))

    def _apply(self, images: Tensor, chosen: Tensor, sigma: Tensor) -> Tensor:
        kernel = get_gaussian_kernel1d(self.side, sigma[:, None])  # (batch, side)
        return where_chosen(chosen, filter2d_separable(images, kernel, kernel, "reflect"), images)


class Solarize:
    """Inverts what is at or above half, as `PIL.ImageOps.solarize` does.

    Args:
        probability (`float`): of each image to be changed.
    """

    def __init__(self, probability: float) -> None:
        self._drawing = K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=probability)

    def draw(self, shape: torch.Size) -> Drawn:
        """Draws which images are changed."""
        return Drawn(self._apply, (self._drawing.forward_parameters(shape)["batch_prob"],))

    def _apply(self, images: Tensor, chosen: Tensor) -> Tensor:
        return where_chosen(chosen, torch.where(images < 0.5, images, 1.0 - images), images)


def where_chosen(chosen: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    """Returns the changed images where `chosen`, of shape (batch,), is above half, and the others as they are."""
    return torch.where(chosen[:, None, None, None] > 0.5, changed, images)


def check_probabilities(**probabilities: float) -> None:
    """Refuses numbers that are no probabilities.

    Raises:
        `ValueError`: with the argument and its value.
    """
    for argument, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"`{argument}` is {value}; it must be a probability between 0 and 1.")
