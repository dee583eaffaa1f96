"""Processes of one run have the same arguments."""

from dataclasses import fields
from typing import Any

import torch.distributed as dist
from transformers import TrainingArguments

from ..distributed import world_size

# What may differ: names of processes, places, and what a process shows.
_OWN = frozenset(
    {
        *("output_dir", "local_rank", "logging_dir", "run_name", "resume_from_checkpoint"),
        *("disable_tqdm", "log_level", "log_level_replica", "report_to", "push_to_hub"),
    }
)


def check_same_arguments(args: TrainingArguments) -> None:
    """Refuses processes that were started with different arguments: one would wait for ever, or all would train
    something that nobody has asked for. Called on each process.

    Raises:
        `ValueError`: on each process, with the arguments that differ.
    """
    if world_size() == 1:
        return
    own = {field.name: repr(getattr(args, field.name)) for field in fields(args) if field.name not in _OWN}
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    differing = [
        f"{name} is {found[0][name]} on process 0 and {other[name]} on process {rank}"
        for rank, other in enumerate(found)
        for name in own
        if other[name] != found[0][name]
    ]
    if differing:
        raise ValueError(f"The processes of this run have different arguments: {'; '.join(differing[:5])}.")
