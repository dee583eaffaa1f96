"""Views of image batches, made on the device of the images from the random numbers of a key.

A transform is called as `transform(inputs, key)`. It takes uint8 images of shape (batch, 3, height, width) in
`inputs["pixel_values"]` and returns float32 images, normalised by channel. It is a pure function of its two arguments:
the global random states are left as they were.

Colours are changed by kornia. The crop is our own, because kornia's either runs image by image or neither filters
before it shrinks nor stays inside the image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, Self

import torch
from transformers import BitImageProcessorPil
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .alternation import keyed_random_state
from .batches import copy_without_waiting
from .decoded import resize_side
from .preprocessing import Preprocessing
from .resampling import check_resample, resampling_weights
from .view_operations import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Operation,
    RandomCrop,
    Solarize,
    check_probabilities,
    place,
)

CROP_SCALE = (0.08, 1.0)
# The paper's numbers were made with this range of the aspect ratio; (3/4, 4/3) is the usual one.
CROP_RATIO = (0.5, 1.0)


class _ImageTransform(ABC):
    """What the transforms share: checked inputs, no gradients, full precision, keyed random numbers, normalisation.

    Attributes:
        settings (`dict[str, Any]`): what it was made with, as JSON can hold it; a resumed run must have the same.
    """

    def __init__(self, image_size: int, mean: Sequence[float], std: Sequence[float], resample: int) -> None:
        self.resize_side = resize_side(image_size)
        self.image_size = image_size
        check_resample(resample)
        self.resample = resample
        for argument, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"`{argument}` is {values}; it must have 3 numbers, one per channel.")
        if min(std) <= 0:
            raise ValueError(f"`std` is {std}; all three must be above 0.")
        # Mean and deviation of the channels, copied to a device when they are first needed there.
        self._constants = {torch.device("cpu"): tuple(torch.tensor(values).view(3, 1, 1) for values in (mean, std))}
        self.settings: dict[str, Any] = {
            "image_size": image_size, "image_mean": [*mean], "image_std": [*std], "resample": int(resample),
        }  # fmt: skip

    @classmethod
    def from_processor(cls, processor: Any, *, image_size: int | None = None, **options: Any) -> Self:
        """Returns the transform with what a backbone expects of its images.

        Args:
            processor: image processor of `transformers`, its dictionary, or what [`load_preprocessing`] returns.
            image_size (`int`, *optional*): side of the images, in pixels; that of the processor if not given.
            **options: other arguments of the transform; they win.

        Raises:
            `TypeError`: if `processor` is nothing of this kind.
            `ValueError`: if it does what the transforms do not, or names no size and none is given.
        """
        taken = Preprocessing.from_processor(processor, image_size=image_size)
        return cls(taken.side, **{**taken.options, **options})

    def __call__(self, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        """Transforms a batch.

        Args:
            inputs (`dict[str, Any]`): `pixel_values`, uint8, shape (batch, 3, height, width), and maybe others.
            key (`Sequence[int]`): decides the random numbers.

        Returns:
            `dict[str, Any]`: `pixel_values`, float32, and the other inputs as far as the transform keeps them.

        Raises:
            `TypeError`: if `pixel_values` is no uint8 tensor.
            `ValueError`: if it is missing or has another shape.
        """
        if "pixel_values" not in inputs:
            raise ValueError(f"The inputs are {sorted(inputs)}; they must have 'pixel_values'.")
        images = inputs["pixel_values"]
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
            kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
            raise TypeError(f"`pixel_values` is {kind}; it must be a tensor of type torch.uint8.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"`pixel_values` has the shape {tuple(images.shape)}; it must be (batch, 3, height, width)."
            )
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.transform(images, inputs, key)

    @abstractmethod
    def transform(self, images: torch.Tensor, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        """Returns the outputs for checked images."""

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Subtracts the mean and divides by the deviation of each channel."""
        mean, std = self._on(images.device)
        return (images - mean) / std

    def denormalize(self, images: torch.Tensor) -> torch.Tensor:
        """Undoes [`normalize`] and returns what can be shown: uint8, shape `(..., 3, height, width)`."""
        mean, std = self._on(images.device)
        return (255 * (images * std + mean)).round().clamp(0, 255).to(torch.uint8)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self._constants:
            cpu = self._constants[torch.device("cpu")]
            self._constants[device] = tuple(copy_without_waiting(value, device) for value in cpu)
        return self._constants[device]


class TwoViewTransform(_ImageTransform):
    """Two random views of each image, for pretext tasks such as SimCLR. Labels and other inputs are dropped.

    The operations and their strengths are the paper's: crop, flip, colour jitter (0.4, 0.4, 0.2, 0.1), greyscale,
    Gaussian blur with a deviation of 0.1 to 2 pixels, solarisation. An operation of probability 0 is left out.

    Args:
        image_size (`int`): side of the views, in pixels.
        crop_scale (`tuple[float, float]`, *optional*, defaults to `(0.08, 1.0)`): range of the crop's share of the
            area.
        crop_ratio (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.0)`): range of the crop's width by its
            height. The paper's results were made with this range; (3/4, 4/3) is usual elsewhere.
        horizontal_flip (`float`, *optional*, defaults to 0.5): probability of a flip.
        color_jitter (`float`, *optional*, defaults to 0.8): probability of colour jitter.
        grayscale (`float`, *optional*, defaults to 0.2): probability of greyscale.
        blur (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.1)`): probability of blur in each view. The
            kernel's side is a tenth of `image_size`, odd and at least 3.
        solarize (`tuple[float, float]`, *optional*, defaults to `(0.0, 0.2)`): probability of solarisation in each
            view.
        mean (`Sequence[float]`, *optional*): mean of each channel, by default ImageNet's.
        std (`Sequence[float]`, *optional*): deviation of each channel, by default ImageNet's.
        resample (`int`, *optional*, defaults to 3): number of Pillow's filter, bicubic by default.

    Raises:
        `TypeError`: if `image_size` is no integer.
        `ValueError`: if a size, range or probability is not allowed.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf import TwoViewTransform
    >>> images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    >>> TwoViewTransform(32)({"pixel_values": images}, key=(0, 0))["pixel_values"].shape
    torch.Size([4, 2, 3, 32, 32])
    ```
    """

    def __init__(
        self,
        image_size: int,
        *,
        crop_scale: tuple[float, float] = CROP_SCALE,
        crop_ratio: tuple[float, float] = CROP_RATIO,
        horizontal_flip: float = 0.5,
        color_jitter: float = 0.8,
        grayscale: float = 0.2,
        blur: tuple[float, float] = (1.0, 0.1),
        solarize: tuple[float, float] = (0.0, 0.2),
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        resample: int = PILImageResampling.BICUBIC,
    ) -> None:
        super().__init__(image_size, mean, std, resample)
        self._crop = RandomCrop(image_size, crop_scale, crop_ratio, horizontal_flip, resample)
        check_probabilities(color_jitter=color_jitter, grayscale=grayscale)
        for argument, values in (("blur", blur), ("solarize", solarize)):
            if len(values) != 2:
                raise ValueError(f"`{argument}` is {values}; it must have 2 probabilities, one per view.")
            check_probabilities(**{f"{argument}[{view}]": value for view, value in enumerate(values)})
        self._operations = [
            self._build(color_jitter, grayscale, view_blur, view_solarize)
            for view_blur, view_solarize in zip(blur, solarize, strict=True)
        ]
        self.settings |= self._crop.settings
        self.settings |= {"color_jitter": color_jitter, "grayscale": grayscale}
        self.settings |= {"blur": [*blur], "solarize": [*solarize]}

    def _build(self, jitter: float, grayscale: float, blur: float, solarize: float) -> list[Operation]:
        kernel = max(3, self.image_size // 10 | 1)
        builders: list[tuple[float, Callable[[float], Operation]]] = [
            (jitter, ColorJitter),
            (grayscale, Grayscale),
            (blur, lambda p: GaussianBlur(p, kernel)),
            (solarize, Solarize),
        ]
        return [self._crop, *(build(probability) for probability, build in builders if probability > 0)]

    def transform(self, images: torch.Tensor, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        with keyed_random_state(key):
            drawn = [[operation.draw(images.shape) for operation in operations] for operations in self._operations]
        placed = iter(place(list(chain(*drawn)), images.device))
        views = []
        for operations in drawn:
            view = images
            for operation in islice(placed, len(operations)):
                view = operation.apply(view, *operation.draws)
            views.append(self.normalize(view))
        return {"pixel_values": torch.stack(views, dim=1)}


class TrainTransform(_ImageTransform):
    """A random crop and flip of each image, for downstream training. Labels and other inputs are kept.

    Args:
        image_size (`int`): side of the crops, in pixels.
        crop_scale (`tuple[float, float]`, *optional*, defaults to `(0.08, 1.0)`): range of the crop's share of the
            area.
        crop_ratio (`tuple[float, float]`, *optional*, defaults to `(0.5, 1.0)`): range of the crop's width by its
            height, as in [`TwoViewTransform`].
        horizontal_flip (`float`, *optional*, defaults to 0.5): probability of a flip.
        mean (`Sequence[float]`, *optional*): mean of each channel, by default ImageNet's.
        std (`Sequence[float]`, *optional*): deviation of each channel, by default ImageNet's.
        resample (`int`, *optional*, defaults to 3): number of Pillow's filter, bicubic by default.

    Raises:
        `TypeError`: if `image_size` is no integer.
        `ValueError`: if a size, range or probability is not allowed.
    """

    def __init__(
        self,
        image_size: int,
        *,
        crop_scale: tuple[float, float] = CROP_SCALE,
        crop_ratio: tuple[float, float] = CROP_RATIO,
        horizontal_flip: float = 0.5,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        resample: int = PILImageResampling.BICUBIC,
    ) -> None:
        super().__init__(image_size, mean, std, resample)
        self._crop = RandomCrop(image_size, crop_scale, crop_ratio, horizontal_flip, resample)
        self.settings |= self._crop.settings

    def transform(self, images: torch.Tensor, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        with keyed_random_state(key):
            (crop,) = place([self._crop.draw(images.shape)], images.device)
        return {**inputs, "pixel_values": self.normalize(crop.apply(images, *crop.draws))}


class EvalTransform(_ImageTransform):
    """The middle of each image, without random numbers; the key is not used. Labels and other inputs are kept.

    The short side is resized to `image_size * 256 / 224`, unless it has that length already, and a square of
    `image_size` is cut from the middle. On images stored by [`DecodedImages`] the result is that of
    [`image_processor`]; an image that is resized here may differ from it by a level of 255.

    Args:
        image_size (`int`): side of the crops, in pixels.
        mean (`Sequence[float]`, *optional*): mean of each channel, by default ImageNet's.
        std (`Sequence[float]`, *optional*): deviation of each channel, by default ImageNet's.
        resample (`int`, *optional*, defaults to 3): number of Pillow's filter, bicubic by default.

    Raises:
        `TypeError`: if `image_size` is no integer.
        `ValueError`: if `image_size`, `mean` or `std` is not allowed.
    """

    def __init__(
        self,
        image_size: int,
        *,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        resample: int = PILImageResampling.BICUBIC,
    ) -> None:
        super().__init__(image_size, mean, std, resample)

    def transform(self, images: torch.Tensor, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        levels = images.float()
        if min(images.shape[-2:]) != self.resize_side:
            levels = self._resize(levels)
        top, left = ((side - self.image_size) // 2 for side in levels.shape[-2:])
        middle = levels[..., top : top + self.image_size, left : left + self.image_size]
        return {**inputs, "pixel_values": self.normalize(middle / 255)}

    def _resize(self, levels: torch.Tensor) -> torch.Tensor:
        """Resizes the short side in two passes, each rounded to whole levels, as Pillow does."""
        # Columns first; recent versions of Pillow begin with the rows of some tall images.
        short = min(levels.shape[-2:])
        rows, columns = (
            resampling_weights(
                levels.new_zeros(1),
                levels.new_full((1,), side),
                side,
                int(self.resize_side * side / short),
                self.resample,
            )
            for side in levels.shape[-2:]
        )
        levels = (levels @ columns.mT + 0.5).floor().clamp(0, 255)
        return (rows @ levels + 0.5).floor().clamp(0, 255)


def image_processor(
    image_size: int,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    resample: int = PILImageResampling.BICUBIC,
) -> BitImageProcessorPil:
    """Returns the image processor of `transformers` that does what [`EvalTransform`] does, to save beside a model.

    It opens with `AutoImageProcessor`, without this package and without torchvision; with torchvision installed,
    `AutoImageProcessor` resizes by torchvision, whose pixels differ slightly.

    Args:
        image_size (`int`): side of the images that the model sees, in pixels.
        mean (`Sequence[float]`, *optional*): mean of each channel, by default ImageNet's.
        std (`Sequence[float]`, *optional*): deviation of each channel, by default ImageNet's.
        resample (`int`, *optional*, defaults to 3): number of Pillow's filter, bicubic by default.

    Returns:
        `BitImageProcessorPil`: resizes the short side, crops the middle, normalises.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": resize_side(image_size)},
        crop_size={"height": image_size, "width": image_size},
        resample=resample,
        image_mean=list(mean),
        image_std=list(std),
    )
