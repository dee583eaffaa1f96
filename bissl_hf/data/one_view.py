"""One random view of each image, for pretext tasks that do not compare views."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from .augment import TrainTransform


class OneViewTransform(TrainTransform):
    """A random crop and flip of each image, without labels and other inputs, for masked image modelling. The ranges
    are those of its paper (He et al., arXiv 2111.06377, appendix A.1).

    Args:
        image_size (`int`): side of the crops, in pixels.
        crop_scale (`tuple[float, float]`, *optional*, defaults to `(0.2, 1.0)`): range of the crop's share of the
            area.
        crop_ratio (`tuple[float, float]`, *optional*, defaults to `(3 / 4, 4 / 3)`): range of the crop's width by its
            height.
        horizontal_flip (`float`, *optional*, defaults to 0.5): probability of a flip.
        mean (`Sequence[float]`, *optional*): mean of each channel, by default ImageNet's.
        std (`Sequence[float]`, *optional*): deviation of each channel, by default ImageNet's.
        resample (`int`, *optional*, defaults to 3): number of Pillow's filter, bicubic by default.

    Raises:
        `TypeError`: if `image_size` is no integer.
        `ValueError`: if a size, range or probability is not allowed.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.data.one_view import OneViewTransform
    >>> images = torch.randint(0, 256, (4, 3, 40, 40), dtype=torch.uint8)
    >>> OneViewTransform(32)({"pixel_values": images}, key=(0, 0))["pixel_values"].shape
    torch.Size([4, 3, 32, 32])
    ```
    """

    def __init__(
        self,
        image_size: int,
        *,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: float = 0.5,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        resample: int = PILImageResampling.BICUBIC,
    ) -> None:
        super().__init__(
            image_size,
            crop_scale=crop_scale,
            crop_ratio=crop_ratio,
            horizontal_flip=horizontal_flip,
            mean=mean,
            std=std,
            resample=resample,
        )

    def transform(self, images: torch.Tensor, inputs: dict[str, Any], key: Sequence[int]) -> dict[str, Any]:
        return super().transform(images, {}, key)
