"""How the time of an alternation grows with its sizes, and that it does not grow with the data set."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from ..data.decoded import DecodedImages
from .loops import BareLoop
from .measuring import interleaved_seconds
from .workload import Workload, build_model, build_trainer

# What is changed, and to which values; the first is the one that the others are compared with.
AXES: dict[str, tuple[int, ...]] = {
    "lower_batch": (16, 32, 64),
    "image_size": (32, 48, 64),
    "width": (16, 32, 64),
    "rows": (1_000, 10_000, 100_000, 1_000_000),
}
BASE = Workload("growth", 32, 16, 8, lower_steps=4, upper_steps=2, products=2, width=16, repeats=3)


def images_on_disk(path: Path, rows: int, image_size: int) -> DecodedImages:
    """Writes synthetic images to a file and maps it, as decoded images of a large data set are.

    Args:
        path (`Path`): an `.npy` file to create.
        rows (`int`): how many images.
        image_size (`int`): their side, in pixels.
    """
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(rows, 3, image_size, image_size))
    generator = np.random.default_rng(0)
    for start in range(0, rows, 10_000):
        block = pixels[start : start + 10_000]
        block[:] = generator.integers(0, 256, block.shape, dtype=np.uint8)
    pixels.flush()
    return DecodedImages(path, np.arange(rows) % 10)


def measure_growth(
    device: torch.device,
    *,
    base: Workload = BASE,
    axes: dict[str, tuple[int, ...]] = AXES,
    say: Callable[[str], Any] = print,
) -> dict[str, list[dict[str, float]]]:
    """Times alternations of a bare loop, one size changed at a time, all values of a size in turn.

    Args:
        device (`torch.device`)
        base ([`Workload`], *optional*): the sizes that are not changed.
        axes (`dict[str, tuple[int, ...]]`, *optional*): fields of the workload, or `rows` of the data set, with the
            values to try.
        say (`Callable`, *optional*): gets one line before each size.

    Returns:
        `dict`: by size, for each value the median seconds and their ratio to the first value's.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for axis, values in axes.items():
            say(f"Alternations against {axis}: {', '.join(f'{value:,}' for value in values)}")
            loops = {str(value): _loop(base, axis, value, device, Path(folder)).alternation for value in values}
            times = interleaved_seconds(loops, device, repeats=base.repeats)
            medians = [median(seconds) for seconds in times.values()]
            found[axis] = [
                {"value": value, "seconds": spent, "ratio": spent / medians[0]}
                for value, spent in zip(values, medians, strict=True)
            ]
    return found


def _loop(base: Workload, axis: str, value: int, device: torch.device, folder: Path) -> BareLoop:
    torch.manual_seed(0)
    workload = base if axis == "rows" else base.changed(**{axis: value})
    trainer = build_trainer(workload, build_model(workload), device)
    if axis == "rows":
        images = images_on_disk(folder / f"{value}.npy", value, workload.image_size // 2)
        for source in trainer.streams.sources.values():
            source.dataset = images
    return BareLoop(trainer, trainer.model)


def growth_rows(growth: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """Returns what was measured as rows of a table."""
    return [
        {
            "size": axis,
            "value": f"{point['value']:,.0f}",
            "s per alternation": f"{point['seconds']:.3f}",
            "ratio": f"{point['ratio']:.2f}",
        }
        for axis, points in growth.items()
        for point in points
    ]
