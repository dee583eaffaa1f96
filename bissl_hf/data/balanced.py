"""Labelled rows in which each class is equally often."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .alternation import read_rows

BALANCED = "balanced"


def row_labels(dataset: Any) -> np.ndarray:
    """Returns the class numbers of all rows of a data set, shape `(rows,)`; of one where a row may have several
    classes, shape `(rows, classes)`. A data set without an attribute `labels` is read for it."""
    known = getattr(dataset, "labels", None)
    if known is None:
        rows = (dataset[number] for number in range(len(dataset)))
        known = [int(row["labels"] if "labels" in row else row["label"]) for row in rows]
    return np.asarray(known)


class BalancedRows(torch.utils.data.Dataset):
    """A data set in which each class has as many rows as the most frequent one: those of the others are repeated, one
    after another, and no row of any class is left out. A pass over it is longer accordingly; transforms that draw by
    key make other views of a repeated row.

    Args:
        dataset: map-style data set with one class per row.

    Raises:
        `ValueError`: if a row may have several classes, or labels are no class numbers.

    Example:

    ```python
    >>> from bissl_hf.data.balanced import BalancedRows
    >>> rows = BalancedRows([{"labels": 0}, {"labels": 1}, {"labels": 0}, {"labels": 0}])
    >>> len(rows), [row["labels"] for row in rows].count(1)
    (6, 3)
    ```
    """

    def __init__(self, dataset: Any) -> None:
        labels = row_labels(dataset)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"The labels have the shape {labels.shape} and the type {labels.dtype}; only rows with one class each "
                "can be balanced. Leave class_sampling out."
            )
        self.dataset = dataset
        classes, counts = np.unique(labels, return_counts=True)
        self.rows = np.concatenate([np.resize(np.flatnonzero(labels == each), counts.max()) for each in classes])
        self.labels = labels[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[int(self.rows[index])]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return read_rows(self.dataset, self.rows[np.asarray(indices, dtype=np.int64)])


def sampled(dataset: Any, class_sampling: str | None) -> Any:
    """Returns the data set, or with `"balanced"` its [`BalancedRows`].

    Raises:
        `ValueError`: for another word.
    """
    if class_sampling not in (None, BALANCED):
        raise ValueError(f"class_sampling is {class_sampling!r}; it must be {BALANCED}, or be left out.")
    return dataset if class_sampling is None else BalancedRows(dataset)
