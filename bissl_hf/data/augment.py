"""Views of images, made on the device. A transform is `transform(inputs, key) -> inputs`, deterministic in its key.

Inputs hold `pixel_values`, uint8 of shape (batch, 3, height, width). Outputs are float32, normalised with ImageNet's
mean and deviation. Random transforms are kornia's; they draw from the global random state, which is seeded by the key and
given back as it was.
"""

from collections.abc import Sequence
from typing import Any

import kornia.augmentation as K
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .alternation import keyed_random_state
from .decoded import resize_side

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Strengths of the colour jitter: brightness, contrast, saturation, hue (paper, section 4).
_JITTER = (0.4, 0.4, 0.2, 0.1)
_BLUR_SIGMA = (0.1, 2.0)


def _check_range(name: str, bounds: Sequence[float], largest: float) -> tuple[float, float]:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= largest:
        raise ValueError(
            f"{name} is {list(bounds)}; it must hold a smallest and a largest value, in order, above 0"
            + (f" and at most {largest:g}." if largest < float("inf") else ".")
        )
    return float(bounds[0]), float(bounds[1])


def _check_probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; it must be a probability between 0 and 1.")
    return float(value)


def _check_pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if len(values) != 2:
        raise ValueError(f"{name} is {list(values)}; it must hold one probability for each of the two views.")
    return _check_probability(name, values[0]), _check_probability(name, values[1])


def normalize(images: Tensor) -> Tensor:
    """Subtracts ImageNet's mean and divides by its deviation, for images in [0, 1], shape `(batch, 3, height,
    width)`."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images - mean) / std


def _crop_and_flip(
    image_size: int, crop_scale: Sequence[float], crop_ratio: Sequence[float], horizontal_flip: float
) -> list[nn.Module]:
    resize_side(image_size)  # checks the size
    crop = K.RandomResizedCrop(
        (image_size, image_size),
        scale=_check_range("crop_scale", crop_scale, 1.0),
        ratio=_check_range("crop_ratio", crop_ratio, float("inf")),
        resample="bicubic",
        cropping_mode="resample",
    )
    flip = _check_probability("horizontal_flip", horizontal_flip)
    return [crop, K.RandomHorizontalFlip(p=flip)] if flip else [crop]


def _random_views(operations: list[nn.Module], images: Tensor) -> Tensor:
    """Applies kornia's operations to uint8 images and normalises the result."""
    views = images.float() / 255
    for operation in operations:
        # A bicubic crop overshoots; later operations expect the range of colours.
        views = operation(views).clamp(0, 1)
    return normalize(views)


class TwoViewTransform:
    """Two random views of each image, with the paper's values as defaults (section 4). An operation of probability 0
    is not built.

    Args:
        image_size (`int`): side of a view in pixels.
        crop_scale (`Sequence[float]`, *optional*, defaults to `(0.08, 1.0)`): smallest and largest area of a crop.
        crop_ratio (`Sequence[float]`, *optional*, defaults to `(0.5, 1.0)`): smallest and largest aspect ratio, as in
            the authors' published code.
        horizontal_flip (`float`, *optional*, defaults to 0.5): probability.
        color_jitter (`float`, *optional*, defaults to 0.8): probability of jitter of (0.4, 0.4, 0.2, 0.1).
        grayscale (`float`, *optional*, defaults to 0.2): probability.
        blur (`Sequence[float]`, *optional*, defaults to `(1.0, 0.1)`): probabilities in the two views of a Gaussian
            blur of sigma 0.1 to 2.0, whose kernel spans about a tenth of the image.
        solarize (`Sequence[float]`, *optional*, defaults to `(0.0, 0.2)`): probabilities in the two views.

    Raises:
        `ValueError`: for a size, range or probability out of bounds.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf import TwoViewTransform
    >>> images = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    >>> TwoViewTransform(32)({"pixel_values": images}, (0, 0))["pixel_values"].shape
    torch.Size([4, 2, 3, 32, 32])
    ```
    """

    def __init__(
        self,
        image_size: int,
        *,
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (0.5, 1.0),
        horizontal_flip: float = 0.5,
        color_jitter: float = 0.8,
        grayscale: float = 0.2,
        blur: Sequence[float] = (1.0, 0.1),
        solarize: Sequence[float] = (0.0, 0.2),
    ) -> None:
        jitter, gray = _check_probability("color_jitter", color_jitter), _check_probability("grayscale", grayscale)
        kernel = max(3, image_size // 10 // 2 * 2 + 1)
        self._views: list[list[nn.Module]] = []
        for blurred, solarized in zip(_check_pair("blur", blur), _check_pair("solarize", solarize), strict=True):
            operations = _crop_and_flip(image_size, crop_scale, crop_ratio, horizontal_flip)
            if jitter:
                operations.append(K.ColorJitter(*_JITTER, p=jitter))
            if gray:
                operations.append(K.RandomGrayscale(p=gray))
            if blurred:
                operations.append(K.RandomGaussianBlur((kernel, kernel), _BLUR_SIGMA, p=blurred))
            if solarized:
                operations.append(K.RandomSolarize(thresholds=(0.5, 0.5), additions=(0.0, 0.0), p=solarized))
            self._views.append(operations)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], key: tuple[int, ...]) -> dict[str, Any]:
        """Returns `pixel_values` of shape `(batch, 2, 3, size, size)` and nothing else: a pretext task has no
        labels."""
        with keyed_random_state(key):
            views = [_random_views(operations, inputs["pixel_values"]) for operations in self._views]
        return {"pixel_values": torch.stack(views, dim=1)}


class TrainTransform:
    """Downstream training images: a random crop and flip (paper, section 4).

    Args:
        image_size, crop_scale, crop_ratio, horizontal_flip: see [`TwoViewTransform`].
    """

    def __init__(
        self,
        image_size: int,
        *,
        crop_scale: Sequence[float] = (0.08, 1.0),
        crop_ratio: Sequence[float] = (0.5, 1.0),
        horizontal_flip: float = 0.5,
    ) -> None:
        self._operations = _crop_and_flip(image_size, crop_scale, crop_ratio, horizontal_flip)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], key: tuple[int, ...]) -> dict[str, Any]:
        """Returns the inputs with `pixel_values` of shape `(batch, 3, size, size)`."""
        with keyed_random_state(key):
            images = _random_views(self._operations, inputs["pixel_values"])
        return {**inputs, "pixel_values": images}


class EvalTransform:
    """Images for evaluation: short side to `image_size * 256 / 224`, centre crop (paper, section 4). Images stored
    with that short side ([`DecodedImages`] for evaluation) are only cropped; they then agree with `image_processor` to
    rounding.

    Args:
        image_size (`int`): side of the result in pixels.
    """

    def __init__(self, image_size: int) -> None:
        self._size, self._side = image_size, resize_side(image_size)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], key: tuple[int, ...]) -> dict[str, Any]:
        """Returns the inputs with `pixel_values` of shape `(batch, 3, size, size)`; the key is not used."""
        images = inputs["pixel_values"].float()
        short = min(images.shape[-2:])
        if short != self._side:
            size = [
                self._side if length == short else int(self._side * length / short) for length in images.shape[-2:]
            ]
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
            images = images.round().clamp(0, 255)  # as an image library would return them
        top, left = ((length - self._size) // 2 for length in images.shape[-2:])
        images = images[..., top : top + self._size, left : left + self._size]
        return {**inputs, "pixel_values": normalize(images / 255)}


def image_processor(image_size: int) -> Any:
    """Returns the image processor of transformers that prepares a raw image as the evaluation does, to be saved beside
    a model.

    Args:
        image_size (`int`): side of the images that the model sees, in pixels.
    """
    # The PIL backend, which needs no torchvision; where that is installed AutoImageProcessor picks its faster sibling.
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    return BitImageProcessorPil(
        size={"shortest_edge": resize_side(image_size)},
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )
