"""Room in shared memory for the batches that loader workers make."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

SHARED_MEMORY = Path("/dev/shm")
_PREFETCH = 2  # of `torch.utils.data.DataLoader`, where none is given


def check_shared_memory(
    batches: Iterable[tuple[Any, int]],
    *,
    num_workers: int,
    prefetch_factor: int | None = None,
    num_processes: int = 1,
    folder: Path = SHARED_MEMORY,
) -> None:
    """Refuses workers whose batches do not fit in shared memory. Started all the same, a worker dies of a bus error,
    or waits for ever.

    Args:
        batches (`Iterable[tuple[Any, int]]`): a map-style data set, whose rows are dicts, and the rows of a batch on
            one process; each pair that a loader reads.
        num_workers (`int`): of a process.
        prefetch_factor (`int`, *optional*): batches that a worker makes ahead; those of torch if not given.
        num_processes (`int`, *optional*, defaults to 1): on this machine.
        folder (`Path`, *optional*): where shared memory is; where there is no such folder nothing is checked.

    Raises:
        `ValueError`: with the room that is needed and that there is.
    """
    if num_workers == 0 or not folder.is_dir():
        return
    largest = max((rows * _bytes_of(dataset) for dataset, rows in batches if len(dataset)), default=0)
    # Those made ahead, and the one in use.
    need = num_processes * largest * (num_workers * (prefetch_factor or _PREFETCH) + 1)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(
            f"dataloader_num_workers is {num_workers}: batches of {largest:,} bytes need {need:,} bytes of shared "
            f"memory, and {str(folder)!r} has {free:,} free: set dataloader_num_workers to 0, make the batches "
            "smaller, or enlarge it (for Docker --shm-size or --ipc=host)."
        )


def processes_here() -> int:
    """Returns how many processes of this run are on this machine, as its launcher says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def _bytes_of(dataset: Any) -> int:
    """Returns the bytes of the tensors of a row; they are the same in all rows."""
    row = dataset[0]
    tensors = [value for value in row.values() if isinstance(value, torch.Tensor)] if isinstance(row, dict) else []
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
