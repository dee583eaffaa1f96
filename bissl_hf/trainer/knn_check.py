"""A running check of pre-training: how well nearest neighbours classify labelled images by the backbone's features."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from accelerate.utils import send_to_device
from transformers import TrainerCallback, default_data_collator

from ..data.alternation import Stream, read_rows
from ..data.streams import Transform
from ..evaluation.features import extract_features
from ..evaluation.probes import knn_accuracy
from .resumable_trainer import ResumableTrainer


class KnnCheck(TrainerCallback):
    """Logs `knn_accuracy` while a model is trained without labels; the training does not see the result.

    Args:
        trainer ([`ResumableTrainer`]): whose model is checked; the callback is to be added to it.
        reference, held_out: labelled, map-style data sets: the images among which neighbours are looked for, and the
            images to classify.
        eval_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, run on the device.
        every (`int`): epochs between two checks; the last epoch is always checked.
        neighbors (`int`): how many neighbours vote.

    Raises:
        `ValueError`: if `every` or `neighbors` is below 1.
    """

    def __init__(
        self,
        trainer: ResumableTrainer,
        reference: Any,
        held_out: Any,
        *,
        eval_transform: Transform | None = None,
        every: int = 1,
        neighbors: int = 20,
    ) -> None:
        for name, value in (("every", every), ("neighbors", neighbors)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.trainer, self.reference, self.held_out = trainer, reference, held_out
        self.eval_transform = eval_transform
        self.every, self.neighbors = every, neighbors

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the model after every `every` epochs, and after the last step."""
        is_last = state.global_step >= state.max_steps
        if state.is_world_process_zero and (is_last or round(state.epoch) % self.every == 0):
            should_log = control.should_log
            self.trainer.log({"knn_accuracy": self.measure()})
            control.should_log = should_log  # Trainer takes any log for that of the epoch

    def measure(self) -> float:
        """Returns the accuracy of the weighted vote of the nearest neighbours, between 0 and 1."""
        transform = self.eval_transform
        splits = [labelled_features(self.trainer, dataset, transform) for dataset in (self.reference, self.held_out)]
        features, labels = zip(*splits, strict=True)
        return knn_accuracy(features[0], labels[0], features[1], labels[1], neighbors=self.neighbors)


def labelled_features(
    trainer: ResumableTrainer, dataset: Any, eval_transform: Transform | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of the backbone that a trainer trains, shape `(rows, width)`, and the labels.

    Args:
        trainer ([`ResumableTrainer`])
        dataset: labelled, map-style data set.
        eval_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, run on the device.
    """

    def batches() -> Iterator[dict[str, Any]]:
        size = trainer.args.per_device_eval_batch_size
        key = trainer.streams.key(Stream.EVALUATION)._replace(rank=0)
        for start in range(0, len(dataset), size):
            rows = read_rows(dataset, range(start, min(start + size, len(dataset))))
            inputs = send_to_device(default_data_collator(rows), trainer.args.device)
            yield eval_transform(inputs, tuple(key)) if eval_transform else inputs

    return extract_features(trainer.model, batches())
