"""Random views made by Pillow, image by image on the CPU, as most published recipes make them."""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..data.decoded import DecodedImages

# Strengths of brightness, contrast and saturation, and of the hue, as in the paper.
_STRENGTHS, _HUE = (0.4, 0.4, 0.2), 0.1


class PillowViews(Dataset):
    """One or two random views of each image, made by Pillow on the CPU.

    Args:
        images ([`DecodedImages`])
        size (`int`): side of a view, in pixels.
        two_views (`bool`): two views for the pretext task, or one crop with its label.
    """

    def __init__(self, images: DecodedImages, size: int, *, two_views: bool) -> None:
        self._images, self._size, self._two_views = images, size, two_views
        self._mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: int) -> dict[str, Any]:
        example = self._images[row]
        image = Image.fromarray(np.moveaxis(example["pixel_values"].numpy(), 0, -1))
        generator = np.random.default_rng(int(torch.randint(2**31, ())))
        if not self._two_views:
            return {"pixel_values": self._to_tensor(self._crop(image, generator)), "labels": example["labels"]}
        views = [self._colour(self._crop(image, generator), generator, second) for second in (False, True)]
        return {"pixel_values": torch.stack([self._to_tensor(view) for view in views])}

    def _crop(self, image: Image.Image, generator: np.random.Generator) -> Image.Image:
        width, height = image.size
        area, ratio = width * height * generator.uniform(0.08, 1.0), generator.uniform(0.5, 1.0)
        wide, high = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
        left, top = generator.uniform(0, width - wide), generator.uniform(0, height - high)
        box = (left, top, left + wide, top + high)
        crop = image.resize((self._size, self._size), Image.Resampling.BICUBIC, box=box)
        return ImageOps.mirror(crop) if generator.random() < 0.5 else crop

    def _colour(self, image: Image.Image, generator: np.random.Generator, second: bool) -> Image.Image:
        if generator.random() < 0.8:
            enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for enhancer, strength in zip(enhancers, _STRENGTHS, strict=True):
                image = enhancer(image).enhance(generator.uniform(1 - strength, 1 + strength))
            hue, saturation, value = image.convert("HSV").split()
            shift = round(255 * generator.uniform(-_HUE, _HUE))
            hue = Image.fromarray((np.asarray(hue).astype(np.int16) + shift).astype(np.uint8))
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
        if generator.random() < 0.2:
            image = ImageOps.grayscale(image).convert("RGB")
        if generator.random() < (0.1 if second else 1.0):
            image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0.1, 2.0)))
        return ImageOps.solarize(image) if second and generator.random() < 0.2 else image

    def _to_tensor(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
        return (pixels / 255 - self._mean) / self._std
