"""What the pretext task sees: samples of images with their views."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..data.augment import TwoViewTransform
from ..data.decoded import DecodedImages
from ..data.one_view import OneViewTransform
from ..evaluation.figures import plot_views

NUM_SAMPLES = 8
ViewTransform = TwoViewTransform | OneViewTransform


@dataclass
class PreviewArguments:
    """A look ahead."""

    preview: bool = field(
        default=False,
        metadata={"help": f"Write the views of {NUM_SAMPLES} images as one picture beside output_dir, and stop."},
    )


def sample_views(
    images: DecodedImages, transform: ViewTransform, *, seed: int = 0, number: int = NUM_SAMPLES
) -> list[list[np.ndarray]]:
    """Returns images from all over a data set, each with its views, uint8, shape `(3, height, width)`.

    Args:
        images ([`DecodedImages`])
        transform ([`TwoViewTransform`] or [`OneViewTransform`])
        seed (`int`, *optional*, defaults to 0): of the views.
        number (`int`, *optional*, defaults to 8): images at most.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, number).astype(int)).tolist()
    pixels = torch.stack([row["pixel_values"] for row in images.__getitems__(rows)])
    views = transform.denormalize(transform({"pixel_values": pixels}, key=(seed,))["pixel_values"])
    views = views.reshape(len(pixels), -1, *views.shape[-3:])  # one view or several
    return [[image.numpy(), *own.numpy()] for image, own in zip(pixels, views, strict=True)]


def write_preview(images: DecodedImages, transform: ViewTransform, output_dir: str, *, seed: int) -> None:
    """Writes the views of a few images as one picture beside the output folder, and says where."""
    path = Path(output_dir)
    path = path.with_name(f"{path.name}_views.png")
    plot_views(sample_views(images, transform, seed=seed), path)
    print(
        f"{NUM_SAMPLES} images with their views are in {path}. Nothing was trained: start without --preview to do so."
    )
