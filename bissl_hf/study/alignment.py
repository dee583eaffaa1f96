"""What the features of a backbone are worth before it is fine-tuned."""

from dataclasses import asdict
from typing import Any

import numpy as np

from ..cli.finetuning import FineTuning
from ..data.augment import EvalTransform
from ..data.decoded import DecodedImages
from ..evaluation.analysis import report_features
from ..trainer.knn_check import labelled_features

MAX_ROWS = 1000


def measure_alignment(tuning: FineTuning, **changes: Any) -> dict[str, float]:
    """Measures the backbone that fine-tuning starts from, under its batch norm: nearest neighbours, linear probe,
    silhouette and scatter of the classes, see [`FeatureReport`], on at most `MAX_ROWS` images of each split.

    Args:
        tuning ([`FineTuning`])
        **changes: of its arguments.
    """
    trainer = tuning.build_trainer(**changes)
    trainer.start_batch_norm()
    transform = EvalTransform.from_processor(tuning.preprocessing)
    splits = {"train": tuning.images.train, "validation": tuning.images.validation, "test": tuning.images.test}
    features = {name: labelled_features(trainer, _some(split), transform) for name, split in splits.items()}
    return asdict(report_features(features, num_classes=len(tuning.images.class_names)))


def _some(split: DecodedImages) -> DecodedImages:
    """The same rows for every arm and seed."""
    if len(split) <= MAX_ROWS:
        return split
    return split.select(np.sort(np.random.default_rng(0).permutation(len(split))[:MAX_ROWS]).tolist())
