"""Batches of a task that compares images with each other."""

from ..trainer.resumable_args import ResumableTrainingArguments
from ..trainer.training_args import BiSSLTrainingArguments


def check_pairs(args: ResumableTrainingArguments) -> None:
    """SimCLR compares images, so no part of a pretext batch may hold a single one.

    Raises:
        `ValueError`: with the field that makes one.
    """
    if not isinstance(args, BiSSLTrainingArguments):
        _check_batch("per_device_train_batch_size", args.per_device_train_batch_size)
        return
    batches = {"per_device_lower_batch_size": args.per_device_lower_batch_size}
    if args.curvature_batch_size is not None:
        batches["curvature_batch_size"] = args.curvature_batch_size // args.world_size
    part = args.lower_micro_batch_size
    for name, batch in batches.items():
        _check_batch(name, batch)
        if part is not None and (part == 1 or batch % part == 1):
            raise ValueError(
                f"lower_micro_batch_size is {part}, which leaves a part of 1 image from {name} {batch}; SimCLR "
                "compares images, so each part needs at least 2."
            )


def _check_batch(name: str, batch: int) -> None:
    if batch < 2:
        raise ValueError(f"{name} is {batch}; SimCLR compares images, so it must be at least 2.")
