"""From a run to its report: what was predicted, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from ..cards.facts import ModelFacts
from ..cards.record import Settings, settings_of
from ..data.alternation import Stream
from ..data.decoded import DecodedImages
from ..evaluation.errors import most_confident_errors, softmax
from ..evaluation.metrics import SINGLE_LABEL
from ..evaluation.proportions import PairedDifference, compare_paired
from ..report.page import interval_text
from ..report.pictures import png_uri
from ..report.record import Evaluated, Picture
from ..tasks.downstream import DownstreamTask
from ..tasks.labelled import LabelledImages
from ..text import format_table
from ..trainer.resumable_trainer import ResumableTrainer
from .outputs import name_metrics
from .views import sample_views

NUM_ERRORS = 20
_NONE = np.zeros(0, dtype=np.int64)


def prediction_lists(task: DownstreamTask, logits: Any) -> dict[str, list[Any]]:
    """Returns the predicted classes and their probabilities as lists; empty ones where an image has not one class.

    Args:
        task ([`DownstreamTask`])
        logits: shape `(images, classes)`.
    """
    if task.problem_type != SINGLE_LABEL:
        return {"predicted": [], "confidence": []}
    probabilities = softmax(np.asarray(logits))
    return {"predicted": probabilities.argmax(-1).tolist(), "confidence": probabilities.max(-1).round(6).tolist()}


def evaluated(
    model: str,
    split: str,
    images: DecodedImages,
    predictions: Mapping[str, Any] | None,
    metrics: Mapping[str, float],
) -> Evaluated:
    """Returns a model on a split as a report takes it.

    Args:
        model, split (`str`): for people.
        images ([`DecodedImages`]): of the split.
        predictions (`Mapping`, *optional*): of [`prediction_lists`], where they were kept.
        metrics (`Mapping`): by names without prefix.
    """
    predicted = np.asarray(predictions["predicted"] if predictions else _NONE, dtype=np.int64)
    labels = np.asarray(images.labels) if len(predicted) else _NONE
    confidence = np.asarray(predictions["confidence"] if predictions else _NONE, dtype=np.float64)
    return Evaluated(model, split, labels, predicted, confidence, metrics, len(images))


def difference(before: Evaluated, after: Evaluated) -> PairedDifference | None:
    """Returns the difference of two models on the same images; `None` where an image has not one class."""
    if not len(after.predicted):
        return None
    return compare_paired(before.predicted == before.labels, after.predicted == after.labels)


def error_pictures(found: Evaluated, images: DecodedImages, class_names: list[str]) -> list[Picture]:
    """Returns the most confident errors of a model on a split."""
    rows = most_confident_errors(found.labels, found.predicted, found.confidence, NUM_ERRORS)
    pictures = []
    for row in rows:
        lines = [
            f"is {class_names[found.labels[row]]}",
            f"taken for {class_names[found.predicted[row]]}",
            f"{100 * found.confidence[row]:.0f} %, row {row}",
        ]
        pictures.append(Picture([png_uri(images[row]["pixel_values"].numpy())], lines, f"test image {row}"))
    return pictures


def data_lines(dataset: str, images: LabelledImages, lower: tuple[str, int] | None = None) -> dict[str, str]:
    """Returns what a run has read, by what for.

    Args:
        dataset (`str`): as the user named it.
        images ([`LabelledImages`])
        lower (`tuple[str, int]`, *optional*): name and size of the unlabelled data.
    """
    sizes = ", ".join(f"{len(getattr(images, split)):,} {split}" for split in ("train", "validation", "test"))
    lines = {"Labelled images": f"{dataset}: {sizes}", "Classes": f"{len(images.class_names)}"}
    return lines | ({"Unlabelled images": f"{lower[0]}: {lower[1]:,}"} if lower else {})


def settings_of_facts(facts: ModelFacts) -> dict[str, Settings]:
    """Returns the settings of a recipe beside those of the trainer's arguments."""
    return {part: settings_of(held) for part, held in facts.settings.items() if is_dataclass(held)}


def sample_pictures(trainer: ResumableTrainer, images: DecodedImages) -> list[Picture]:
    """Returns images with the views of them that the pretext task of a trainer sees."""
    transform: Any = trainer.streams.transform(Stream.LOWER)  # one that shows images
    samples = sample_views(images, transform, seed=trainer.args.seed)
    return [Picture([png_uri(image) for image in sample], [], "an image and its views") for sample in samples]


def format_outcomes(found: Sequence[Evaluated]) -> str:
    """Returns the metrics of models on splits as a table for the console."""
    short = {"top-5 accuracy": "top 5", "mean per class": "per class"}
    rows = []
    for each in found:
        row = {"split": each.split, "model": each.model, "n": f"{each.examples:,}"}
        for name, value in name_metrics({f"_{name}": value for name, value in each.metrics.items()}, "").items():
            row[short.get(name, name)] = value
            if name == "accuracy":
                row["95 % interval"] = interval_text(each)
        rows.append({**row, "loss": f"{each.metrics['loss']:.4f}"})
    return format_table(rows)
