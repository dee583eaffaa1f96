"""Where batches come from: data sets with their transforms, read by key on one process and one device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from transformers.utils import logging

from .alternation import (
    MODEL_RANDOMNESS,
    AlternatingDataLoader,
    AlternationSampler,
    KeyedDataset,
    KeyedSource,
    StepKey,
    Stream,
    keyed_random_state,
    read_rows,
)
from .batches import copy_without_waiting

logger = logging.get_logger(__name__)

Inputs = dict[str, Any]
Transform = Callable[[Inputs, tuple[int, ...]], Inputs]


class Streams:
    """The streams of batches of one process of a run.

    Args:
        device (`torch.device`): where batches go, and their transforms run.
        seed (`int`): seed of the run.
        rank (`int`): number of this process.
    """

    def __init__(self, *, device: torch.device, seed: int, rank: int) -> None:
        self.device, self.seed, self.rank = device, seed, rank
        self.sources: dict[Stream, KeyedSource] = {}
        self._transforms: dict[Stream, Transform | None] = {}

    def add(self, stream: Stream, source: KeyedSource | None, transform: Transform | None) -> None:
        """Adds a stream.

        Args:
            stream ([`Stream`])
            source ([`KeyedSource`], *optional*): none for batches that others read (in an evaluation).
            transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, deterministic in the key.
        """
        if source is not None:
            self.sources[stream] = source
        self._transforms[stream] = transform

    def transform(self, stream: Stream) -> Transform | None:
        """Returns the transform of a stream."""
        return self._transforms[stream]

    def key(self, stream: Stream, alternation: int = 0, step: int = 0) -> StepKey:
        """Returns the name of a batch of this process."""
        return StepKey(self.seed, int(stream), alternation, step, self.rank)

    def read(self, key: StepKey) -> Inputs:
        """Returns the batch that `key` names, on the device and transformed."""
        return self.prepare(self.sources[Stream(key.stream)].read(key), key)

    def prepare(self, inputs: Inputs, key: StepKey) -> Inputs:
        """Moves a batch that was read to the device and applies the transform of its stream there."""
        inputs = recursively_apply(copy_without_waiting, inputs, self.device)
        transform = self._transforms[Stream(key.stream)]
        return transform(inputs, tuple(key)) if transform else inputs

    def first_rows(self, stream: Stream, rows: int) -> tuple[Inputs, StepKey]:
        """Returns the first rows of a stream's data set, prepared as those of its first batch, and their key. The
        same on each process."""
        source, key = self.sources[stream], self.key(stream)._replace(rank=0)
        inputs = source.collator(read_rows(source.dataset, range(min(rows, len(source.dataset)))))
        return self.prepare(inputs, key), key

    def loader(self, phases: Sequence[tuple[Stream, int]], **loader_options: Any) -> AlternatingDataLoader:
        """Returns a loader of tagged batches, already divided between the processes (so not to be prepared again).

        Args:
            phases (`Sequence[tuple[Stream, int]]`): streams with their steps in an alternation, in order.
            **loader_options: of `torch.utils.data.DataLoader`.
        """
        num_examples = sum(self.sources[stream].batch_size * steps for stream, steps in phases)
        return AlternatingDataLoader(
            KeyedDataset(self.sources, num_examples),
            AlternationSampler(phases, seed=self.seed, rank=self.rank),
            **loader_options,
        )

    def describe(self, *streams: Stream) -> dict[str, str]:
        """Returns what decides which rows the keys of some streams name, by their names in lower case."""
        return {stream.name.lower(): self.sources[stream].describe() for stream in streams}


@contextmanager
def model_randomness(key: StepKey) -> Iterator[None]:
    """Seeds what a model draws in the step named by `key` (dropout, masks)."""
    with keyed_random_state((*key, MODEL_RANDOMNESS)):
        yield


def check_map_style(dataset: Any, *, name: str) -> None:
    """Refuses a data set that is missing or empty, or whose rows cannot be read by number.

    Raises:
        `TypeError`: for a data set that is read in one order only.
        `ValueError`: for one without rows.
    """
    if dataset is not None and (
        isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")
    ):
        raise TypeError(
            f"{name} is a {type(dataset).__name__}, which is read in one order only, and steps read the rows that "
            "their keys name. Take a map-style data set: leave out streaming=True, or "
            "`datasets.Dataset.from_list(list(...))`."
        )
    if dataset is None or len(dataset) == 0:
        raise ValueError(f"{name} is {'missing' if dataset is None else 'empty'}; it is needed for training.")


def check_pretext_batch(batch: int, dataset: Any, *, name: str, field: str) -> None:
    """Refuses a pretext batch larger than its data set.

    Args:
        batch (`int`): rows of all processes together.
        dataset: map-style data set, or `None`.
        name, field (`str`): names of the data set and of the argument that sets the batch, for messages.

    Raises:
        `ValueError`: if the data set is missing, empty or smaller than a batch.
    """
    check_map_style(dataset, name=name)
    if batch > len(dataset):
        raise ValueError(
            f"{field} makes a batch of {batch}, and {name} has {len(dataset)} examples; choose a batch that is not "
            "larger."
        )


def labelled_batch_size(per_device: int, world: int, dataset: Any) -> int:
    """Returns the batch of all processes for labelled data; one larger than the data is cut to them, with a warning.

    Args:
        per_device (`int`): rows per process and step.
        world (`int`): number of processes.
        dataset: map-style data set.

    Raises:
        `ValueError`: if there is not even one example per process.
    """
    check_map_style(dataset, name="train_dataset")
    num_examples = len(dataset)
    if num_examples < world:
        raise ValueError(f"train_dataset has {num_examples} examples for {world} processes; each needs at least one.")
    batch = per_device * world
    if batch <= num_examples:
        return batch
    cut = num_examples // world * world
    logger.warning_once(
        f"The labelled batch of {batch} ({per_device} on each of {world} processes) is larger than the {num_examples} "
        f"labelled examples; it is cut to {cut}."
    )
    return cut
