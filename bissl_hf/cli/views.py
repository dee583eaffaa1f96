"""What the pretext task sees: samples of images with their views."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..data.augment import TwoViewTransform
from ..data.decoded import DecodedImages
from ..evaluation.figures import plot_views
from ..report.pictures import png_uri
from ..report.record import Picture

NUM_SAMPLES = 8


@dataclass
class PreviewArguments:
    """A look ahead."""

    preview: bool = field(
        default=False,
        metadata={"help": f"Write the views of {NUM_SAMPLES} images as one picture beside output_dir, and stop."},
    )


def sample_views(
    images: DecodedImages, transform: TwoViewTransform, *, seed: int = 0, number: int = NUM_SAMPLES
) -> list[list[np.ndarray]]:
    """Returns images from all over a data set, each with its views, uint8, shape `(3, height, width)`.

    Args:
        images ([`DecodedImages`])
        transform ([`TwoViewTransform`])
        seed (`int`, *optional*, defaults to 0): of the views.
        number (`int`, *optional*, defaults to 8): images at most.
    """
    rows = np.unique(np.linspace(0, len(images) - 1, number).astype(int)).tolist()
    pixels = torch.stack([row["pixel_values"] for row in images.__getitems__(rows)])
    views = transform.denormalize(transform({"pixel_values": pixels}, key=(seed,))["pixel_values"])
    return [[image.numpy(), *own.numpy()] for image, own in zip(pixels, views, strict=True)]


def view_pictures(samples: list[list[np.ndarray]]) -> list[Picture]:
    """Returns samples as pictures of a report."""
    return [Picture([png_uri(image) for image in sample], [], "an image and its views") for sample in samples]


def write_preview(images: DecodedImages, transform: TwoViewTransform, output_dir: str, *, seed: int) -> None:
    """Writes the views of a few images as one picture beside the output folder, and says where."""
    path = Path(output_dir)
    path = path.with_name(f"{path.name}_views.png")
    plot_views(sample_views(images, transform, seed=seed), path)
    print(
        f"{NUM_SAMPLES} images with their views are in {path}. Nothing was trained: start without --preview to do so."
    )
