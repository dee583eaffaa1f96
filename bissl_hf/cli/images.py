"""The image data of a run: arguments, decoded splits and transforms."""

from dataclasses import dataclass, field
from typing import Any

import datasets

from ..data.augment import TrainTransform, TwoViewTransform
from ..data.decoded import UNREADABLE
from ..data.one_view import OneViewTransform
from ..data.sources import load_image_dataset
from ..data.subsets import take_examples
from ..tasks.labelled import check_several_classes


@dataclass
class DataArguments:
    """The labelled images of a recipe."""

    dataset: str = field(
        default="",
        metadata={"help": "Labelled images: a known name (digits, stl10, ...), a folder, a Parquet file or a Hub id."},
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of --dataset on the Hub; else that of the known name."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset, where it has several."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of images in --dataset; found by itself if usual."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column of labels in --dataset; found by itself if usual."}
    )
    train_examples: int | None = field(
        default=None,
        metadata={"help": "Labelled training images to use, in the same mix of classes; all if not given."},
    )
    image_size: int = field(default=96, metadata={"help": "Side of the square images that the model sees, in pixels."})
    unreadable: str = field(
        default="stop",
        metadata={
            "help": "Images that cannot be read: stop, or skip to leave them out. Both name all of them.",
            "choices": list(UNREADABLE),
        },
    )


@dataclass
class CropArguments:
    """How training images are cropped and flipped."""

    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Smallest and largest area of a random crop."}
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Smallest and largest aspect ratio of a random crop."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})


@dataclass
class ViewArguments(CropArguments):
    """How the two views of a pretext image are made."""

    color_jitter: float = field(default=0.8, metadata={"help": "Probability of colour jitter in a view."})
    grayscale: float = field(default=0.2, metadata={"help": "Probability of greyscale in a view."})
    blur: list[float] = field(
        default_factory=lambda: [1.0, 0.1], metadata={"help": "Probabilities of blur in the two views."}
    )
    solarize: list[float] = field(
        default_factory=lambda: [0.0, 0.2], metadata={"help": "Probabilities of solarisation in the two views."}
    )


def check_dataset(arguments: DataArguments, would: str) -> None:
    """Refuses to start without a data set.

    Args:
        arguments ([`DataArguments`])
        would (`str`): what the command would do with one, as a sentence.

    Raises:
        `ValueError`: with what to write.
    """
    if not arguments.dataset:
        raise ValueError(
            f"No dataset is given. {would} Name the images: --dataset digits (which needs no network), another known "
            "name, a folder with one folder per class, a Parquet file or a Hub id; or --config FILE.yaml. "
            "`bissl-hf demo` shows a whole run."
        )


def load_labelled(arguments: DataArguments, *, seed: int) -> datasets.DatasetDict:
    """Loads the data set that the arguments name. Where they choose some of its training images, all of them stay as
    unlabelled ones if it has no such split.

    Raises:
        `ValueError`: see [`load_image_dataset`] and [`take_examples`]; also if it has a single class.
    """
    splits = load_image_dataset(
        arguments.dataset,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        seed=seed,
        revision=arguments.dataset_revision,
        dataset_config=arguments.dataset_config,
    )
    check_several_classes(splits, name=arguments.dataset)
    if arguments.train_examples is not None:
        splits.setdefault("unlabeled", splits["train"].select_columns("image"))
        splits["train"] = take_examples(splits["train"], arguments.train_examples, seed=seed)
    return splits


def build_train_transform(image_size: int, arguments: CropArguments) -> TrainTransform:
    """Returns the random crops of downstream training."""
    return TrainTransform(image_size, **_crop_options(arguments))


def build_view_transform(
    image_size: int, arguments: ViewArguments, pretext: str = "simclr"
) -> TwoViewTransform | OneViewTransform:
    """Returns the views of a pretext task: two to be compared, or one for masked images, which takes the crops and
    flips only."""
    if pretext == "mae":
        return OneViewTransform(image_size, **_crop_options(arguments))
    return TwoViewTransform(
        image_size,
        **_crop_options(arguments),
        color_jitter=arguments.color_jitter,
        grayscale=arguments.grayscale,
        blur=tuple(arguments.blur),  # type: ignore[arg-type]
        solarize=tuple(arguments.solarize),  # type: ignore[arg-type]
    )


def _crop_options(arguments: CropArguments) -> dict[str, Any]:
    for name in ("crop_scale", "crop_ratio"):
        if len(getattr(arguments, name)) != 2:
            raise ValueError(f"{name} is {getattr(arguments, name)}; it must be two numbers, the lower one first.")
    return {
        "crop_scale": tuple(arguments.crop_scale),
        "crop_ratio": tuple(arguments.crop_ratio),
        "horizontal_flip": arguments.horizontal_flip,
    }
