"""A running check of pre-training: how well nearest neighbours classify labelled images by the backbone's features."""

from collections.abc import Callable, Iterator, Mapping
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
        model (`Callable`, *optional*): returns the model whose backbone is checked; the trained one if not given.
        feature_figures (`Mapping[str, Callable]`, *optional*): further figures of the held-out features, shape
            `(rows, width)`, by the name under which they are logged.

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
        model: Callable[[], Any] | None = None,
        feature_figures: Mapping[str, Callable[[np.ndarray], float]] | None = None,
    ) -> None:
        for name, value in (("every", every), ("neighbors", neighbors)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        self.trainer, self.reference, self.held_out = trainer, reference, held_out
        self.eval_transform, self.model = eval_transform, model
        self.feature_figures = dict(feature_figures or {})
        self.every, self.neighbors = every, neighbors

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks the model after every `every` epochs, and after the last step."""
        is_last = state.global_step >= state.max_steps
        if state.is_world_process_zero and (is_last or round(state.epoch) % self.every == 0):
            should_log = control.should_log
            self.trainer.log(self.measure())
            control.should_log = should_log  # Trainer takes any log for that of the epoch

    def measure(self) -> dict[str, float]:
        """Returns `knn_accuracy`, that of the weighted vote of the nearest neighbours, between 0 and 1, and the other
        figures."""
        model = self.model() if self.model else None
        reference, held_out = (
            labelled_features(self.trainer, dataset, self.eval_transform, model)
            for dataset in (self.reference, self.held_out)
        )
        others = {name: figure(held_out[0]) for name, figure in self.feature_figures.items()}
        return {"knn_accuracy": knn_accuracy(*reference, *held_out, neighbors=self.neighbors), **others}


def labelled_features(
    trainer: ResumableTrainer, dataset: Any, eval_transform: Transform | None = None, model: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the features of the backbone that a trainer trains, shape `(rows, width)`, and the labels.

    Args:
        trainer ([`ResumableTrainer`])
        dataset: labelled, map-style data set.
        eval_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, run on the device.
        model (*optional*): another model, on the device.
    """

    def batches() -> Iterator[dict[str, Any]]:
        size = trainer.args.per_device_eval_batch_size
        key = trainer.streams.key(Stream.EVALUATION)._replace(rank=0)
        for start in range(0, len(dataset), size):
            rows = read_rows(dataset, range(start, min(start + size, len(dataset))))
            inputs = send_to_device(default_data_collator(rows), trainer.args.device)
            yield eval_transform(inputs, tuple(key)) if eval_transform else inputs

    return extract_features(trainer.model if model is None else model, batches())
