"""The images of a study, each set decoded once."""

from dataclasses import replace

import numpy as np
from datasets import Dataset

from ..cli.images import DataArguments, load_labelled
from ..data.decoded import DecodedImages
from ..data.sources import load_image_dataset
from ..data.subsets import take_examples
from ..tasks.labelled import LabelledImages, decode_labelled, decode_unlabelled
from .fields import naming
from .plan import StudyArguments


class StudyImages:
    """The pretext images and the downstream sets of a study.

    Args:
        study ([`StudyArguments`])

    Raises:
        `ValueError`: see [`load_image_dataset`]; also for numbers of labelled examples that a set does not have.
    """

    pretext: DecodedImages

    def __init__(self, study: StudyArguments) -> None:
        self._labelled: dict[str, LabelledImages] = {}
        self._labels: dict[str, Dataset] = {}
        for name in study.datasets:
            splits = load_labelled(DataArguments(dataset=name), seed=study.split_seed)
            count = study.validation_examples
            if count is not None and count < len(splits["validation"]):
                with naming(f"validation_examples on {name}"):
                    splits["validation"] = take_examples(splits["validation"], count, seed=study.split_seed)
            labels = splits["train"].remove_columns("image")
            self._labels[name] = labels.add_column("row", np.arange(len(labels)))
            for count in study.train_examples:
                self._rows(name, count, seed=0)
            self._labelled[name] = decode_labelled(splits, study.image_size)
        splits = load_image_dataset(study.pretext_dataset, seed=study.split_seed, require_labels=False)
        self.pretext = decode_unlabelled(splits, study.image_size)

    def take(self, dataset: str, train_examples: int, *, seed: int) -> LabelledImages:
        """Returns a set with a number of labelled training images, which the seed chooses."""
        images = self._labelled[dataset]
        return replace(images, train=images.train.select(self._rows(dataset, train_examples, seed=seed)))

    def _rows(self, dataset: str, count: int, *, seed: int) -> list[int]:
        with naming(f"train_examples on {dataset}"):
            return take_examples(self._labels[dataset], count, seed=seed)["row"][:]
