"""The images of both levels with all that a trainer needs beside a model, from the name of a folder or data set."""

import os
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict

from ..data.augment import TrainTransform, TwoViewTransform
from ..data.decoded import DecodedImages
from ..data.one_view import OneViewTransform
from ..data.preprocessing import Preprocessing
from ..data.sources import load_image_dataset
from ..models.image_size import own_preprocessing
from ..models.loading import load_config
from ..models.pretext import pretext_tasks
from .downstream import DownstreamTask
from .labelled import check_several_classes, decode_labelled, decode_unlabelled

ImageSource: TypeAlias = str | os.PathLike[str] | Dataset | DatasetDict


@dataclass(frozen=True, kw_only=True)
class ImageTask(DownstreamTask):
    """A downstream task with the decoded images of both levels. Make one with [`load_image_task`] and pass it to any
    trainer and to [`BiSSLModel.from_backbone`] as `task`.

    Args:
        problem_type, class_names, preprocessing, train_transform, class_weights: see [`DownstreamTask`].
        train, validation, test ([`DecodedImages`]): the labelled splits.
        unlabeled ([`DecodedImages`]): the images of the pretext task.
        view_transform ([`TwoViewTransform`] or [`OneViewTransform`]): makes the views of the pretext task.
    """

    train: DecodedImages
    validation: DecodedImages
    test: DecodedImages
    unlabeled: DecodedImages
    view_transform: TwoViewTransform | OneViewTransform

    def downstream_arguments(self) -> dict[str, Any]:
        """Returns what [`FineTuneTrainer`] takes from the task."""
        return {**self.trainer_arguments(), "train_dataset": self.train, "eval_dataset": self.validation}

    def bilevel_arguments(self) -> dict[str, Any]:
        """Returns what [`BiSSLTrainer`] and [`JointTrainer`] take from the task."""
        lower = {"lower_dataset": self.unlabeled, "lower_transform": self.view_transform}
        return {**self.downstream_arguments(), **lower}

    def pretext_arguments(self) -> dict[str, Any]:
        """Returns what [`PretextTrainer`] takes from the task."""
        return {
            "train_dataset": self.unlabeled,
            "train_transform": self.view_transform,
            "processing_class": self.image_processor,
        }


def load_image_task(
    images: ImageSource,
    *,
    unlabeled: ImageSource | None = None,
    image_size: int | None = None,
    processor: Any = None,
    class_weights: str | list[float] | None = None,
    pretext: str = "simclr",
    unreadable: str = "stop",
    seed: int = 0,
    **load_options: Any,
) -> ImageTask:
    """Loads and decodes the images of both levels, with the paper's augmentations.

    Args:
        images (`str`, `os.PathLike`, `Dataset` or `DatasetDict`): labelled images, as [`load_image_dataset`] takes
            them: a folder with one folder per class, a known name, a Hub id, or a data set in memory.
        unlabeled (*optional*): images of the pretext task, likewise; labels are not needed. Defaults to the split
            `unlabeled` of the labelled images, or else their training images.
        image_size (`int`, *optional*): side of the square images that the model sees, in pixels; that of `processor`
            if not given.
        processor (*optional*): what the backbone expects of its images: the folder or Hub id of the backbone, or an
            image processor of `transformers`. Without one, mean and deviation are ImageNet's.
        class_weights (`str` or `list[float]`, *optional*): of the downstream loss, see [`DownstreamLoss`].
        pretext (`str`, *optional*, defaults to `"simclr"`): name of the pretext task; decides the views.
        unreadable (`str`, *optional*, defaults to `"stop"`): what happens to images that cannot be read, see
            [`DecodedImages.from_dataset`].
        seed (`int`, *optional*, defaults to 0): decides which training images make a missing split.
        **load_options: of [`load_image_dataset`], for the labelled images.

    Raises:
        `ValueError`: for an unknown pretext task, a source that cannot be found or read, images of a single class, or
            without a size of the images.

    Example:

    ```python
    >>> from bissl_hf import load_image_task
    >>> task = load_image_task("digits", image_size=8)
    >>> len(task.class_names), task.metric, task.train[0]["pixel_values"].shape
    (10, 'accuracy', torch.Size([3, 8, 8]))
    ```
    """
    if pretext not in pretext_tasks():
        raise ValueError(f"pretext is {pretext!r}; it must be one of {', '.join(pretext_tasks())}.")
    preprocessing = _preprocessing(processor, image_size)
    size = preprocessing.side
    splits = lower = load_image_dataset(images, seed=seed, **load_options)
    check_several_classes(splits, name="The data set" if isinstance(images, Dataset | DatasetDict) else str(images))
    if unlabeled is not None:
        lower = load_image_dataset(unlabeled, seed=seed, require_labels=False)
    labelled = decode_labelled(splits, size, unreadable=unreadable, resample=preprocessing.resample)
    views = OneViewTransform if pretext == "mae" else TwoViewTransform
    return ImageTask(
        problem_type=labelled.problem_type,
        class_names=labelled.class_names,
        preprocessing=preprocessing,
        train_transform=TrainTransform.from_processor(preprocessing),
        class_weights=class_weights,
        train=labelled.train,
        validation=labelled.validation,
        test=labelled.test,
        unlabeled=decode_unlabelled(lower, size, unreadable=unreadable, resample=preprocessing.resample),
        view_transform=views.from_processor(preprocessing),
    )


def _preprocessing(processor: Any, image_size: int | None) -> Preprocessing:
    """Returns how images are prepared."""
    if isinstance(processor, str | os.PathLike):
        processor = own_preprocessing(str(processor), load_config(str(processor)), image_size=image_size)
    if processor is not None:
        return Preprocessing.from_processor(processor, image_size=image_size)
    if image_size is None:
        raise ValueError(
            "image_size is not given; give the side of the images in pixels, or a processor that has one."
        )
    return Preprocessing(image_size=image_size)
