"""How much of the curvature batch is held at once: the arithmetic of `curvature_mode="auto"`."""

import math
from collections.abc import Callable
from typing import Any

import torch

# The rest is for the downstream passes of an upper step, which come while the graph is held.
SHARE_OF_MEMORY = 0.8
# Parts are not made smaller: their kernels would be mostly overhead, and batch norm would see too few rows.
MIN_PART_ROWS = 8
# A small part of the batch is measured, and another twice as large.
_MEASURED_SHARE = 16


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory of its own whose use is known and whose end raises `torch.OutOfMemoryError`."""
    return device.type == "cuda"


def available_bytes(device: torch.device) -> int:
    """Returns what torch may still allocate on a GPU: what is free there within the process's share
    (`torch.cuda.set_per_process_memory_fraction`), and what its allocator holds without using it."""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - reserved
    return max(0, min(free, allowed)) + reserved - torch.cuda.memory_allocated(device)


def peak_growth(action: Callable[[], Any], device: torch.device) -> int:
    """Returns how far the memory in use on a GPU rises at most while a function runs, in bytes."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    action()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def extrapolate_bytes(measure: Callable[[int], int], rows: int) -> int | None:
    """Returns what a product on `rows` rows would take, from a line through two small measurements.

    Args:
        measure (`Callable`): gives the bytes of a product on so many rows. It is called once more before it counts:
            libraries allocate workspaces at their first use.
        rows (`int`)

    Returns:
        `int`, *optional*: `None` for a batch of too few rows to tell.
    """
    small = rows // _MEASURED_SHARE
    if small < 2:
        return None
    measure(small)
    first, second = measure(small), measure(2 * small)
    per_row = max(0.0, (second - first) / small)
    return math.ceil(first + per_row * (rows - small))


def halvings_to_fit(needed: int, available: int) -> int:
    """Returns how often a batch must be halved until a part of it fits the share of the memory that may be taken."""
    allowed = SHARE_OF_MEMORY * max(available, 1)
    return max(0, math.ceil(math.log2(max(needed, 1) / allowed)))


def halve(rows: int, halvings: int) -> int:
    """Returns the rows of a part after so many halvings, rounded up."""
    return -(-rows // 2**halvings)


def most_halvings(rows: int) -> int:
    """Returns how often a batch can be halved before its parts are too small."""
    return max(0, int(math.log2(max(rows, 1) / MIN_PART_ROWS)))
