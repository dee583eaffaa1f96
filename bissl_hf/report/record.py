"""What a report is made from, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..cards.record import RunRecord, Settings


@dataclass(frozen=True)
class Evaluated:
    """A model on a split.

    Args:
        model, split (`str`): for people.
        labels (`np.ndarray`): class numbers, shape `(images,)`; empty where an image may have several.
        predicted (`np.ndarray`): likewise.
        confidence (`np.ndarray`): probability of the predicted class, shape `(images,)`.
        metrics (`Mapping[str, float]`): by names without prefix.
        examples (`int`): images of the split.
    """

    model: str
    split: str
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    metrics: Mapping[str, float]
    examples: int


@dataclass(frozen=True)
class Picture:
    """One or more images side by side (data URIs) with lines of text below."""

    images: Sequence[str]
    lines: Sequence[str]
    alt: str


@dataclass(frozen=True)
class Report:
    """A run as its page shows it. What is not given is left out.

    Args:
        title (`str`)
        run ([`RunRecord`])
        data (`Mapping[str, str]`): what was learned from, by what it was used for.
        settings (`Mapping[str, Settings]`): further arguments, beside those of the record, by the part of the run.
        before, after (`Sequence[Evaluated]`): of the same splits in the same order.
        beside (`Sequence[Evaluated]`): another model on those splits.
        per_class (`Mapping[str, float]`): score of each class on the test split, after.
        per_class_before (`Mapping[str, float]`): likewise, before.
        class_names (`Sequence[str]`)
        conclusions (`Sequence[str]`): sentences on what the figures mean.
        start (`Mapping[str, float]`): figures of alternation 0, by their names in the history.
        views, errors (`Sequence[Picture]`): samples of the two views, and the most confident errors.
        layout (`str`, *optional*): picture of the features (a data URI).
        seconds (`Mapping[str, float]`): by part of the run.
        folder (`str`): where the model is.
        next_steps (`Sequence[str]`): commands that go on from it.
    """

    title: str
    run: RunRecord
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Settings] = field(default_factory=dict)
    before: Sequence[Evaluated] = ()
    after: Sequence[Evaluated] = ()
    beside: Sequence[Evaluated] = ()
    per_class: Mapping[str, float] = field(default_factory=dict)
    per_class_before: Mapping[str, float] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    conclusions: Sequence[str] = ()
    start: Mapping[str, float] = field(default_factory=dict)
    views: Sequence[Picture] = ()
    errors: Sequence[Picture] = ()
    layout: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    folder: str = ""
    next_steps: Sequence[str] = ()


def history_of(report: Report) -> list[dict[str, Any]]:
    """Returns what was logged over the run, alternation 0 first where it was measured."""
    start = [{"epoch": 0.0, **report.start}] if report.start else []
    return [*start, *(dict(row) for row in report.run.log_history if "epoch" in row)]
