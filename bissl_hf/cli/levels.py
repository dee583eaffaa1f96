"""What alignment and joint training share: the data of both levels and the model for the downstream task."""

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from .. import load_image_dataset
from ..data.decoded import DecodedImages
from ..models.image_size import adapt_image_size
from ..models.pretext import downstream_config
from .images import DataArguments, LabelledImages, decode_labelled, decode_unlabelled, load_labelled
from .tasks import DownstreamTask


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
    size, resample, unreadable = data.preprocessing.side, data.preprocessing.resample, data.unreadable
    labelled = decode_labelled(splits, size, unreadable=unreadable, resample=resample)
    without = splits["test"] if lower_data.drop_test_duplicates else None
    unlabelled = decode_unlabelled(lower, size, without=without, unreadable=unreadable, resample=resample)
    return Images(**vars(labelled), lower=unlabelled)


def build_upper(upper_model: str | None, lower: PreTrainedModel, task: DownstreamTask) -> PreTrainedModel:
    """Returns the model for the downstream task: the one that a user has named, or a new one on a backbone like that
    of the pretext model."""
    if upper_model:
        return adapt_image_size(task.load_model(upper_model, field="upper_model"), task.preprocessing.side)
    return task.new_model(downstream_config(lower))
