"""The splits of a labelled data set and the images of a pretext task, decoded."""

from collections.abc import Mapping
from dataclasses import dataclass

import datasets
import numpy as np

from ..data.decoded import DecodedImages
from ..data.duplicates import drop_duplicates
from ..data.preprocessing import Preprocessing
from ..data.reading import UNREADABLE_ADVICE, UnreadableImagesError
from ..data.schema import class_names
from ..evaluation.metrics import MULTI_LABEL, REGRESSION, SINGLE_LABEL


@dataclass
class LabelledImages:
    """The decoded splits of a labelled data set."""

    train: DecodedImages
    validation: DecodedImages
    test: DecodedImages
    class_names: list[str]

    @property
    def problem_type(self) -> str:
        """Whether an image has one class, may have several or has a number, as the configuration of a model says
        it."""
        labels = self.train.labels
        if labels is None or labels.ndim == 1:
            return REGRESSION if labels is not None and np.issubdtype(labels.dtype, np.floating) else SINGLE_LABEL
        return MULTI_LABEL


def check_several_classes(splits: Mapping[str, datasets.Dataset], *, name: str) -> None:
    """Refuses labelled splits in which all images are of one class.

    Raises:
        `ValueError`: with the class.
    """
    names = class_names(splits["train"])
    if len(names) < 2:
        raise ValueError(f"{name} has a single class, {names[0]!r}; a classifier needs at least two.")


def decode_labelled(
    splits: Mapping[str, datasets.Dataset],
    image_size: int,
    *,
    unreadable: str = "stop",
    resample: int = Preprocessing.resample,
) -> LabelledImages:
    """Decodes the three labelled splits; training images keep their size where they are square and of one size. For
    `unreadable` and `resample` see [`DecodedImages.from_dataset`].

    Raises:
        `ValueError`: after all splits have been tried, with all their images that cannot be read.
    """
    decoded, failures = {}, []
    for name in ("train", "validation", "test"):
        try:
            decoded[name] = _decode(
                splits[name], image_size, name, native_size=name == "train", unreadable=unreadable, resample=resample
            )
        except UnreadableImagesError as error:
            failures.append(error)
    if failures:
        which = " ".join(failure.description for failure in failures)
        raise ValueError(f"{which} {UNREADABLE_ADVICE}") from failures[0]
    return LabelledImages(**decoded, class_names=class_names(splits["train"]))


def decode_unlabelled(
    splits: Mapping[str, datasets.Dataset],
    image_size: int,
    *,
    without: datasets.Dataset | None = None,
    unreadable: str = "stop",
    resample: int = Preprocessing.resample,
) -> DecodedImages:
    """Decodes the images for a pretext task: the split `unlabeled` where there is one, else the training images;
    without those that are exact duplicates of images in the split `without`.

    Raises:
        `ValueError`: if all of them are.
    """
    unlabelled = splits["unlabeled"] if "unlabeled" in splits else splits["train"].select_columns("image")
    if without is not None:
        before, unlabelled = len(unlabelled), drop_duplicates(unlabelled, without)
        if len(unlabelled) == 0:
            raise ValueError(f"All {before} unlabelled images are test images too; give others with --lower_dataset.")
    return _decode(unlabelled, image_size, "unlabelled", native_size=True, unreadable=unreadable, resample=resample)


def _decode(
    split: datasets.Dataset, image_size: int, name: str, *, native_size: bool, unreadable: str, resample: int
) -> DecodedImages:
    return DecodedImages.from_dataset(
        split,
        image_size=image_size,
        native_size=native_size,
        unreadable=unreadable,
        resample=resample,
        split=name,
        description=f"Decoding {name}",
    )
