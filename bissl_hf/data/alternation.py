"""Which examples are read at which step, and with which random numbers: pure functions of a key.

A key is `(seed, stream, alternation, step, rank)`. Nothing here remembers anything between two calls, so a run that
was interrupted reads on exactly as if it had not been.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Collator = Callable[[list[Any]], dict[str, Any]]


class Stream(IntEnum):
    """The independent sequences of batches of a run."""

    LOWER = 0
    UPPER = 1
    CURVATURE = 2
    HEAD_WARMUP = 3
    EVALUATION = 4

    @property
    def level(self) -> str:
        """The level whose data the stream reads, `"lower"` or `"upper"`."""
        return "lower" if self in (Stream.LOWER, Stream.CURVATURE) else "upper"


# Appended to a key where random numbers are wanted for something else than its views.
MODEL_RANDOMNESS = 1
READING_RANDOMNESS = 2


class StepKey(NamedTuple):
    """Names one batch of one process."""

    seed: int
    stream: int
    alternation: int
    step: int
    rank: int


@contextmanager
def keyed_random_state(key: Sequence[int]) -> Iterator[None]:
    """Seeds the random states of Python, NumPy and torch (CPU and CUDA) from a key; restores them at the end.

    Args:
        key (`Sequence[int]`): integers of at least 0. Keys that differ give independent random numbers.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.data.alternation import keyed_random_state
    >>> with keyed_random_state((0, 1)):
    ...     first = torch.rand(1)
    >>> with keyed_random_state((0, 1)):
    ...     print(torch.equal(first, torch.rand(1)))
    True
    ```
    """
    words = np.random.SeedSequence(list(key)).generate_state(4)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    # Only the device in use: forking the states of all devices would make each of them allocate.
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            torch_seed = int(words[0]) << 32 | int(words[1])
            torch.default_generator.manual_seed(torch_seed)
            if devices:
                torch.cuda.manual_seed(torch_seed)
            np.random.seed(words[2])
            random.seed(int(words[3]))
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@lru_cache(maxsize=8)
def _permutation(num_examples: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    permutation = np.random.default_rng([seed, stream, epoch]).permutation(num_examples)
    permutation.setflags(write=False)
    return permutation


def batch_indices(
    num_examples: int, batch_size: int, position: int, *, seed: int, stream: int, drop_last: bool = True
) -> np.ndarray:
    """Returns the rows of the batch at a position of a stream.

    A stream runs through one permutation of the data after another; each is drawn from (seed, stream, epoch). The rows
    left over at the end of an epoch are skipped, so that no batch holds an example twice.

    Args:
        num_examples (`int`): size of the data set.
        batch_size (`int`): global batch size, at most `num_examples`.
        position (`int`): number of batches of this stream before this one.
        seed (`int`): seed of the run.
        stream (`int`): which stream.
        drop_last (`bool`, *optional*, defaults to `True`): whether to skip the left-over rows; otherwise they make a
            smaller last batch.

    Returns:
        `np.ndarray`: row numbers, shape `(batch_size,)`; fewer in a last batch.

    Raises:
        `ValueError`: if the batch size is not between 1 and `num_examples`.
    """
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"The batch size is {batch_size}; it must be between 1 and the {num_examples} examples.")
    batches = num_examples // batch_size if drop_last else -(-num_examples // batch_size)
    epoch, place = divmod(position, batches)
    return _permutation(num_examples, seed, stream, epoch)[place * batch_size : (place + 1) * batch_size]


def read_rows(dataset: Any, indices: Iterable[int]) -> list[Any]:
    """Reads rows of a map-style data set, in one call where it offers one."""
    rows = [int(index) for index in indices]
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(rows)
    return [dataset[row] for row in rows]


@dataclass
class KeyedSource:
    """A data set read by key.

    Args:
        dataset: map-style data set.
        batch_size (`int`): global batch size.
        collator (`Callable`): stacks a list of rows into a dictionary of tensors.
        steps_per_alternation (`int`): batches of this stream in one alternation.
        world_size (`int`): number of processes; the batch is dealt out to them in equal parts.
    """

    dataset: Any
    batch_size: int
    collator: Collator
    steps_per_alternation: int
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"The batch size {self.batch_size} cannot be dealt out to {self.world_size} processes in equal parts."
            )

    def describe(self) -> str:
        """Tells what decides which rows a key names."""
        return f"{self.steps_per_alternation} batches of {self.batch_size} from {len(self.dataset)} examples"

    def read(self, key: StepKey) -> dict[str, Any]:
        """Returns this process's part of the batch that `key` names."""
        position = key.alternation * self.steps_per_alternation + key.step
        indices = batch_indices(len(self.dataset), self.batch_size, position, seed=key.seed, stream=key.stream)
        share = self.batch_size // self.world_size
        mine = indices[key.rank * share : (key.rank + 1) * share]
        # A row or a collator may draw random numbers, as the masks of a language model are.
        with keyed_random_state((*key, READING_RANDOMNESS)):
            return self.collator(read_rows(self.dataset, mine))


class KeyedDataset(Dataset):
    """Maps a key to the batch that it names, tagged with the key: `{"key": StepKey, "inputs": dict}`."""

    def __init__(self, sources: dict[Stream, KeyedSource], num_examples: int) -> None:
        self.sources = sources
        self._num_examples = num_examples

    def __len__(self) -> int:
        return self._num_examples

    def __getitem__(self, key: StepKey) -> dict[str, Any]:
        return {"key": key, "inputs": self.sources[Stream(key.stream)].read(key)}


class AlternationSampler(Sampler[list[StepKey]]):
    """Yields the keys of one alternation in order: the lower steps, then the upper ones.

    Args:
        phases (`Sequence[tuple[Stream, int]]`): streams with their numbers of steps, in the order they are taken.
        seed (`int`): seed of the run.
        rank (`int`, *optional*, defaults to 0): number of this process.
    """

    def __init__(self, phases: Sequence[tuple[Stream, int]], *, seed: int, rank: int = 0) -> None:
        self.phases = tuple(phases)
        self.seed = seed
        self.rank = rank
        self.alternation = 0

    def set_epoch(self, epoch: int) -> None:
        """Tells which alternation comes next."""
        self.alternation = epoch

    def __len__(self) -> int:
        return sum(steps for _, steps in self.phases)

    def __iter__(self) -> Iterator[list[StepKey]]:
        for stream, steps in self.phases:
            for step in range(steps):
                yield [StepKey(self.seed, int(stream), self.alternation, step, self.rank)]


class AlternatingDataLoader(DataLoader):
    """A loader of tagged batches. Its workers, if any, live as long as the loader does.

    `accelerate.skip_first_batches` finds the sampler inside, which is what a resume in the middle of an alternation
    uses.
    """

    def __init__(
        self, dataset: KeyedDataset, sampler: AlternationSampler, *, num_workers: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(
            dataset,
            batch_sampler=sampler,
            collate_fn=only_item,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            **kwargs,
        )

    def set_epoch(self, epoch: int) -> None:
        """Tells which alternation comes next."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]

    def close(self) -> None:
        """Ends the workers. Left to the garbage collector they are waited for, five seconds each."""
        self._iterator = None


def only_item(items: list[Any]) -> Any:
    """Collates the one tagged batch that a key names."""
    return items[0]
