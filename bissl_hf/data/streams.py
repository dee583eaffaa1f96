"""Where the batches of both levels come from."""

from functools import partial
from typing import Any

from transformers.utils import logging

from ..trainer.training_args import BiSSLTrainingArguments, ResumableTrainingArguments
from .alternation import Collator, KeyedSource, Stream

logger = logging.get_logger(__name__)


def level_sources(
    args: BiSSLTrainingArguments,
    train_dataset: Any,
    lower_dataset: Any,
    collator: Collator,
    lower_collator: Collator,
) -> dict[Stream, KeyedSource]:
    """Returns the streams of a run. An upper batch larger than the labelled set is cut to it, with a warning.

    Args:
        args ([`BiSSLTrainingArguments`]): batch sizes and steps.
        train_dataset, lower_dataset: map-style data sets of the upper and the lower level.
        collator, lower_collator (`Callable`): stack rows into a dictionary of tensors.

    Raises:
        `ValueError`: for data sets that are missing, empty or smaller than a pretext batch.
    """
    world = args.world_size
    for name, dataset in (("train_dataset", train_dataset), ("lower_dataset", lower_dataset)):
        if dataset is None or len(dataset) == 0:
            raise ValueError(f"{name} is {'missing' if dataset is None else 'empty'}; both levels need data.")
    lower_batch = args.per_device_lower_batch_size * world
    curvature_batch = args.curvature_batch_size or lower_batch
    for name, batch in (("per_device_lower_batch_size", lower_batch), ("curvature_batch_size", curvature_batch)):
        if batch > len(lower_dataset):
            raise ValueError(
                f"{name} makes a batch of {batch}, and lower_dataset has {len(lower_dataset)} examples; choose a "
                "batch that is not larger."
            )
    labelled = len(train_dataset)
    upper_batch = labelled_batch_size(args.per_device_train_batch_size, world, labelled)
    labelled_source = partial(KeyedSource, train_dataset, upper_batch, collator, world_size=world)
    lower_source = partial(KeyedSource, lower_dataset, collator=lower_collator, world_size=world)
    return {
        Stream.LOWER: lower_source(batch_size=lower_batch, steps_per_alternation=args.lower_steps),
        Stream.CURVATURE: lower_source(batch_size=curvature_batch, steps_per_alternation=1),
        Stream.UPPER: labelled_source(steps_per_alternation=args.upper_steps),
        Stream.HEAD_WARMUP: labelled_source(steps_per_alternation=labelled // upper_batch),
    }


def pretext_batch_size(args: ResumableTrainingArguments, dataset: Any, *, field: str) -> int:
    """Returns the batch of all processes for pretext data.

    Args:
        args ([`ResumableTrainingArguments`])
        dataset: map-style data set, or `None`.
        field (`str`): the argument that names it, for messages.

    Raises:
        `ValueError`: if the data set is missing or smaller than a batch.
    """
    batch = args.per_device_train_batch_size * args.world_size
    if dataset is None or len(dataset) < batch:
        raise ValueError(
            f"per_device_train_batch_size makes a batch of {batch}, and {field} has "
            f"{0 if dataset is None else len(dataset)} examples; choose a batch that is not larger."
        )
    return batch


def labelled_batch_size(per_device: int, world: int, num_examples: int) -> int:
    """Returns the batch of all processes for labelled data; one larger than the data is cut to them, with a warning.

    Args:
        per_device (`int`): rows per process and step.
        world (`int`): number of processes.
        num_examples (`int`): size of the data set.

    Raises:
        `ValueError`: if there is not even one example per process.
    """
    if num_examples < world:
        raise ValueError(f"train_dataset has {num_examples} examples for {world} processes; each needs at least one.")
    batch = per_device * world
    if batch <= num_examples:
        return batch
    cut = num_examples // world * world
    logger.warning(
        f"The labelled batch of {batch} ({per_device} on each of {world} processes) is larger than the {num_examples} "
        f"labelled examples; it is cut to {cut}."
    )
    return cut
