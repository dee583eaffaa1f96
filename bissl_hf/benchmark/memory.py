"""What the curvature takes of the memory, against batch and width, in each of its modes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bilevel.curvature import CURVATURE_MODES, Curvature
from ..bilevel.gradient_cache import EmbeddingCurvature
from ..data.batches import split_rows
from .loops import BareLoop, Batch
from .measuring import Allocated, allocated_by
from .workload import WORKLOADS, Workload, build_model, build_trainer

# Channels of the first layer, and pairs of a curvature batch.
CPU_SIZES = ((32, 64, 128, 256), (64, 64, 128, 256))
GPU_SIZES = ((64, 128, 256, 512, 1024),)
PART_ROWS = 16
_PRODUCTS = 2


def measure_memory(
    device: torch.device,
    *,
    workload: Workload | None = None,
    sizes: tuple[tuple[int, ...], ...] | None = None,
    say: Callable[[str], Any] = print,
) -> list[dict[str, Any]]:
    """Measures the memory of two products with the curvature, that of its linearisation included, and of one forward
    and backward pass beside it.

    Args:
        device (`torch.device`)
        workload ([`Workload`], *optional*): image size and precision.
        sizes (`tuple[tuple[int, ...], ...]`, *optional*): a width each, with the batches to try.
        say (`Callable`, *optional*): gets one line before each width.

    Returns:
        `list[dict]`: for each width, batch and way the bytes at most and at the end, beyond model and batch.
    """
    on_gpu = device.type == "cuda"
    workload = workload or WORKLOADS["gpu" if on_gpu else "cpu"]
    found = []
    for width, *batches in sizes or (GPU_SIZES if on_gpu else CPU_SIZES):
        say(f"Memory with {width} channels: {', '.join(str(pairs) for pairs in batches)} pairs")
        for pairs in batches:
            for way, taken in _measure(workload.changed(width=width, lower_batch=pairs), device).items():
                found.append(
                    {"width": width, "pairs": pairs, "way": way, "peak_bytes": taken.peak, "held_bytes": taken.held}
                )
    return found


def _measure(workload: Workload, device: torch.device) -> dict[str, Allocated]:
    torch.manual_seed(0)
    trainer = build_trainer(workload, build_model(workload), device, channels_last=workload.bf16)
    loop = BareLoop(trainer, trainer.model)
    loop.model.train()
    size = workload.image_size
    batch = {"pixel_values": torch.rand(workload.lower_batch, 2, 3, size, size, device=device)}
    ways: dict[str, Callable[[], Any]] = {"forward and backward": partial(loop.forward_backward, batch)}
    for mode in CURVATURE_MODES:
        ways[mode] = partial(_take_products, partial(loop.curvature, batch, mode=mode))
    ways[f"parts of {PART_ROWS}"] = partial(_take_products, partial(_in_parts, loop, batch))
    loop.forward_backward(batch)  # libraries allocate workspaces at their first use
    return {way: allocated_by(take, device) for way, take in ways.items()}


def _take_products(build: Callable[[], Curvature]) -> Curvature:
    """Returns the curvature, so that what it holds is seen."""
    curvature = build()
    for _ in range(_PRODUCTS):
        curvature(curvature.gradient)
    return curvature


def _in_parts(loop: BareLoop, batch: Batch) -> EmbeddingCurvature:
    model: Any = loop.model.lower

    def in_precision(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(loop.device.type, torch.bfloat16, enabled=loop.args.bf16):
            return function(*args, **kwargs)

    def embed(part: Batch) -> Tensor:
        return in_precision(loop.model.without_side_effects("lower"), **part, return_loss=False).embeddings.float()

    parts = [partial(embed, part) for part, _ in split_rows(batch, PART_ROWS)]
    return EmbeddingCurvature(parts, partial(in_precision, model.loss_from_embeddings), loop.theta_p)


def memory_rows(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns what was measured as rows of a table: one for each width and batch."""
    rows: dict[tuple[int, int], dict[str, str]] = {}
    for taken in found:
        row = rows.setdefault(
            (taken["width"], taken["pairs"]), {"channels": str(taken["width"]), "pairs": str(taken["pairs"])}
        )
        row[taken["way"]] = f"{taken['peak_bytes'] / 2**20:.0f}, {taken['held_bytes'] / 2**20:.0f}"
    return list(rows.values())
