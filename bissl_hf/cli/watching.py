"""A running check of the backbone by nearest neighbours, as an option of commands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from ..data.augment import EvalTransform
from ..evaluation.monitors import effective_rank
from ..tasks.labelled import LabelledImages
from ..trainer.knn_check import KnnCheck
from ..trainer.resumable_trainer import ResumableTrainer


@dataclass
class WatchArguments:
    """How training is watched."""

    knn_every: int = field(
        default=0,
        metadata={
            "help": "Alternations between two checks of the backbone: training images find the classes of validation "
            "images as their nearest neighbours, and the effective rank of the features (RankMe). 0 for none."
        },
    )
    knn_neighbors: int = field(default=20, metadata={"help": "Neighbours that vote."})
    knn_images: int = field(default=5000, metadata={"help": "Training images among which neighbours are looked for."})

    def __post_init__(self) -> None:
        for name, least in (("knn_every", 0), ("knn_neighbors", 1), ("knn_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")


def add_knn_check(
    trainer: ResumableTrainer,
    images: LabelledImages,
    image_size: int,
    *,
    every: int,
    neighbors: int,
    num_images: int,
    model: Callable[[], Any] | None = None,
) -> None:
    """Adds a [`KnnCheck`] on the validation images to a trainer, with the effective rank of their features.

    Args:
        trainer ([`ResumableTrainer`])
        images ([`LabelledImages`]): with one class each.
        image_size (`int`)
        every, neighbors (`int`): see [`KnnCheck`].
        num_images (`int`): training images at most.
        model (`Callable`, *optional*): see [`KnnCheck`].

    Raises:
        `ValueError`: if an image has not one class.
    """
    labels = images.train.labels
    if labels is not None and (labels.ndim > 1 or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"knn_every is {every}, and the check needs images with one class each; set it to 0.")
    rows = np.random.default_rng(trainer.args.key_seed).permutation(len(images.train))[:num_images]
    check = KnnCheck(
        trainer,
        Subset(images.train, rows.tolist()),
        images.validation,
        eval_transform=EvalTransform(image_size),
        every=every,
        neighbors=neighbors,
        model=model,
        feature_figures={"rankme": rankme},
    )
    trainer.add_callback(check)


def rankme(features: np.ndarray) -> float:
    """Returns the effective rank (see [`effective_rank`]) of features, shape `(images, width)`."""
    return float(effective_rank(torch.from_numpy(features)))
