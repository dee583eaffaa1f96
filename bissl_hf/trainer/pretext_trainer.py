"""Self-supervised pre-training of the lower model alone."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..cards.record import RunRecord
from ..data.alternation import Stream
from ..data.decoded import decoded_for
from ..data.streams import check_pretext_batch
from ..evaluation.monitors import EmbeddingMonitor
from ..models.batch_norm import check_rows_for_batch_norm
from ..tasks.image_task import ImageTask
from .from_task import filled_from_task
from .given import check_arguments, check_rows
from .run_record import record_run, size_of
from .single_level_trainer import SingleLevelTrainer
from .target_update import TargetUpdate
from .training_args import PretextTrainingArguments


class PretextTrainer(SingleLevelTrainer):
    """Trains a pretext model on unlabelled examples, the stage before BiSSL. One epoch is one pass over the data,
    without the rows that do not fill a batch.

    Args:
        model (`PreTrainedModel`): `model(**inputs).loss` is the pretext loss.
        args ([`PretextTrainingArguments`])
        task ([`ImageTask`], *optional*): data, transforms, metrics and image processor; what is given beside it counts
            in its place.
        train_dataset: map-style data set.
        **trainer_kwargs: further arguments of [`SingleLevelTrainer`] (`data_collator`, `train_transform`) and of
            `transformers.Trainer`.

    Raises:
        `ValueError`: if the data set is missing or smaller than a batch, or a process takes one row with batch norm.
    """

    args: PretextTrainingArguments

    @filled_from_task(ImageTask.pretext_arguments)
    def __init__(
        self,
        model: PreTrainedModel,
        args: PretextTrainingArguments,
        *,
        task: ImageTask | None = None,
        train_dataset: Any = None,
        **trainer_kwargs: Any,
    ) -> None:
        check_arguments(args, PretextTrainingArguments, PretextTrainer)
        train_dataset = decoded_for(train_dataset, trainer_kwargs.get("train_transform"), labelled=False)
        batch = args.per_device_train_batch_size * args.world_size
        check_pretext_batch(batch, train_dataset, name="train_dataset", field="per_device_train_batch_size")
        check_rows_for_batch_norm(model, args.per_device_train_batch_size, what="per_device_train_batch_size")
        check_rows(train_dataset, name="train_dataset", transform="train_transform")
        super().__init__(
            model=model,
            args=args,
            role="pretext",
            stream=Stream.LOWER,
            batch_size=batch,
            train_dataset=train_dataset,
            **trainer_kwargs,
        )
        if hasattr(model, "update_target"):
            self.add_callback(TargetUpdate(model))
        self.monitor = EmbeddingMonitor()
        self.checkpoints.register("embeddings", self.monitor)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Watches the embeddings of which the loss is made, for the figures of a collapse."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if isinstance(embeddings := getattr(outputs, "embeddings", None), Tensor):
            self.monitor.watch(embeddings)
        return (loss, outputs) if return_outputs else loss

    def collect_logs(self) -> dict[str, float]:
        """Adds the spread and the effective rank of the embeddings of the last step."""
        for name, figure in self.monitor.pop_figures().items():
            self.metrics_buffer.add(name, figure)
        return super().collect_logs()

    def record(self) -> RunRecord:
        """Returns what a card says of the run and the pretext model."""
        return record_run(self, "pretext", examples={"train": size_of(self.train_dataset)})
