"""What alignment and joint training share: the data of both levels and the model for the downstream task."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from .. import load_image_dataset
from ..data.decoded import DecodedImages
from ..models.classifier import new_classifier
from ..models.pretext import downstream_config
from ..tasks.downstream import DownstreamTask
from ..tasks.labelled import LabelledImages, decode_labelled, decode_unlabelled
from .images import DataArguments, load_labelled
from .models import load_classifier


@dataclass
class LowerDataArguments:
    """What the lower level learns from."""

    lower_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Unlabelled images: a known name, a folder (also without folders of classes), a Parquet file or a "
            "Hub id; else the `unlabeled` split or training images of --dataset."
        },
    )
    drop_test_duplicates: bool = field(
        default=False,
        metadata={"help": "Leave out unlabelled images that are test images of --dataset, pixel by pixel."},
    )


@dataclass
class Images(LabelledImages):
    """The decoded data of both levels."""

    lower: DecodedImages


def load_images(data: DataArguments, lower_data: LowerDataArguments, seed: int) -> Images:
    """Loads and decodes the labelled splits and the images of the pretext task."""
    splits = lower = load_labelled(data, seed=seed)
    if lower_data.lower_dataset:
        lower = load_image_dataset(lower_data.lower_dataset, seed=seed, require_labels=False)
    labelled = decode_labelled(splits, data.image_size, unreadable=data.unreadable)
    without = splits["test"] if lower_data.drop_test_duplicates else None
    unlabelled = decode_unlabelled(lower, data.image_size, without=without, unreadable=data.unreadable)
    return Images(**vars(labelled), lower=unlabelled)


def build_upper(upper_model: str | None, lower: PreTrainedModel, task: DownstreamTask) -> PreTrainedModel:
    """Returns the model for the downstream task: the one that a user has named, or a new one on a backbone like that
    of the pretext model."""
    if upper_model:
        return load_classifier(upper_model, task.class_names, field="upper_model", problem_type=task.problem_type)
    return new_classifier(downstream_config(lower), task.class_names, problem_type=task.problem_type)
