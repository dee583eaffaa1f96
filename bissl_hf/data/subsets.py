"""Choices of rows with the same mix of classes."""

import logging
from collections.abc import Sequence

import numpy as np
from datasets import Dataset

from .schema import class_names, is_multi_label, labels_of

logger = logging.getLogger(__name__)


def stratified_rows(
    labels: Sequence[int] | np.ndarray, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Divides row numbers into two parts with the same mix of classes.

    Args:
        labels (`Sequence[int]` or `np.ndarray`): class number of each row.
        fraction (`float`): share of each class that goes into the second part. Rounded, but at least one row of the
            class goes into each part.
        seed (`int`): decides which rows.

    Returns:
        `tuple`: sorted rows of the first part, of the second part, and the classes that have a single row, which is
            in the first part.
    """
    labels = np.asarray(labels)
    generator = np.random.default_rng(seed)
    second: list[np.ndarray] = []
    single = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        if len(rows) == 1:
            single.append(int(label))
        second.append(rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)])
    chosen = np.sort(np.concatenate(second))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen, single


def strata_of(split: Dataset) -> np.ndarray:
    """Returns one class number per row to stratify by, shape `(rows,)`: the label; or, where an image may have several
    classes, the rarest of them in this split, and -1 where it has none.

    Args:
        split (`Dataset`): in the schema, with labels.
    """
    labels = labels_of(split)
    if not is_multi_label(split):
        return labels
    frequency = np.where(labels > 0, labels.sum(axis=0), np.inf)
    return np.where(labels.any(axis=1), frequency.argmin(axis=1), -1)


def take_examples(split: Dataset, count: int, *, seed: int) -> Dataset:
    """Takes a number of labelled examples in which each class has the share that it has in the split (rounded by
    Webster's method), and at least one. With the same seed a smaller choice is part of a larger one.

    Args:
        split (`Dataset`): in the schema, with labels.
        count (`int`): at least the number of classes that occur, at most all rows.
        seed (`int`): decides which rows.

    Returns:
        `Dataset`: the rows, in the order of the split.

    Raises:
        `ValueError`: for another count.
    """
    strata = strata_of(split)
    classes, sizes = np.unique(strata, return_counts=True)
    if not len(classes) <= count <= len(split):
        raise ValueError(
            f"{count} labelled examples are asked for; there must be between {len(classes)}, one per class, and "
            f"{len(split)}, all that there are."
        )
    generator = np.random.default_rng(seed)
    turn = np.empty(len(split))
    for label, size in zip(classes, sizes, strict=True):
        # The j-th row of a class is due at (j + 1/2) / size; the first row of each class comes before all others.
        due = (np.arange(size) + 0.5) / size
        due[0] = -1
        turn[generator.permutation(np.flatnonzero(strata == label))] = due
    return split.select(np.sort(np.argsort(turn, kind="stable")[:count]))


def carve_split(name: str, splits: dict[str, Dataset], new: str, fraction: float, seed: int) -> dict[str, Dataset]:
    """Moves a share of the training split of the source `name` into a new split.

    Raises:
        `ValueError`: if every class has a single training image.
    """
    train = splits["train"]
    rest, chosen, single = stratified_rows(strata_of(train), fraction, seed)
    if len(chosen) == 0:
        raise ValueError(
            f"{name!r} has no {new!r} split, and none can be taken from 'train', where every class has one image: add "
            f"images or a {new!r} split."
        )
    logger.info(f"{name!r} has no {new!r} split: {len(chosen)} of {len(train)} training images make it.")
    if single and not is_multi_label(train):
        lacking = [class_names(train)[label] for label in single]
        logger.warning(f"The {new!r} split of {name!r} lacks the classes with one training image: {lacking}.")
    return {**splits, "train": train.select(rest), new: train.select(chosen)}
