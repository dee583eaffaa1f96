"""What the stages before and after BiSSL share: one model, one data set, one optimizer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, default_data_collator

from ..data.alternation import AlternatingDataLoader, KeyedSource, Stream
from ..data.streams import Transform, model_randomness
from ..distributed import average_flat
from ..models.backbone import backbone_and_heads
from ..models.batch_norm import running_statistics
from ..models.saving import save_model
from .divergence import check_first_batch
from .resumable_args import ResumableTrainingArguments
from .resumable_trainer import ResumableTrainer


class SingleLevelTrainer(ResumableTrainer):
    """Trains one model on one data set. One epoch is one pass over the data, without the rows that do not fill a
    batch.

    Args:
        args ([`ResumableTrainingArguments`])
        role (`str`): what the data are for, in messages: `"pretext"` or `"downstream"`.
        stream ([`Stream`]): which sequence of batches to read.
        batch_size (`int`): of all processes together, at most the number of examples.
        train_dataset: map-style data set.
        data_collator (`Callable`, *optional*): stacks rows into a dictionary of tensors.
        train_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, run on the device.
        **trainer_kwargs: further arguments of `transformers.Trainer`; `model(**inputs).loss` is the loss.
    """

    model: PreTrainedModel

    def __init__(
        self,
        *,
        args: ResumableTrainingArguments,
        role: str,
        stream: Stream,
        batch_size: int,
        train_dataset: Any,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_transform: Transform | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        self.role, self.stream = role, stream
        data_collator = data_collator or default_data_collator
        self.source = KeyedSource(
            train_dataset,
            batch_size,
            data_collator,
            steps_per_alternation=len(train_dataset) // batch_size,
            world_size=args.world_size,
        )
        super().__init__(args=args, train_dataset=train_dataset, data_collator=data_collator, **trainer_kwargs)
        if train_transform is not None:
            args.remove_unused_columns = False
        self.source.collator = self.data_collator = self.dropping_columns(data_collator, self.model)
        self.streams.add(stream, self.source, train_transform)
        self.check_workers(stream)

    def get_train_dataloader(self) -> AlternatingDataLoader:
        """Returns the loader of tagged batches."""
        return self.keyed_loader((self.stream, self.source.steps_per_alternation))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Returns the optimizer; weight decay applies to every parameter."""
        if self.optimizer is None:
            self.optimizer = self.args.level(num_steps=self.num_planned_steps).build_optimizer(
                *self.backbone_and_heads()
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Returns the schedule, whose warm-up starts with the first step."""
        if self.lr_scheduler is None:
            schedule = self.args.level(num_steps=num_training_steps).build_schedule()
            self.lr_scheduler = LambdaLR(optimizer or self.create_optimizer(), schedule)
            # 2026-11, transformers 5.23: Trainer saves a schedule only if it is marked as its own.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def backbone_and_heads(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the trainable parameters of the backbone, and the others."""
        return backbone_and_heads(self.model)

    @property
    def num_planned_steps(self) -> int:
        """Steps of the whole run."""
        epochs = math.ceil(self.args.num_train_epochs * self.source.steps_per_alternation)
        return self.args.max_steps if self.args.max_steps > 0 else epochs

    def try_settings(self) -> None:
        """Builds the optimizer and the schedule of the whole run."""
        self.create_optimizer()
        self.args.level(num_steps=self.num_planned_steps).build_schedule()

    def resume_settings(self) -> dict[str, Any]:
        """Adds what the stream of batches reads."""
        return {**super().resume_settings(), self.role: self.source.describe()}

    def first_gradients(self) -> list[Tensor | None]:
        """Returns the gradients of the loss on the first batch; in evaluation mode, so that no running statistics
        move."""
        key = self.streams.key(self.stream)
        batch = self.streams.read(key)
        self.model.eval()
        with model_randomness(key), self.accelerator.autocast():
            loss = self.compute_loss(self.model, batch)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> Tensor:
        """Makes the views of a tagged batch and takes Trainer's step on them."""
        key = inputs["key"]
        self.divergence.begin_step(key)
        batch = self.streams.prepare(inputs["inputs"], key)
        self.count_samples(batch)
        with model_randomness(key):
            loss = super().training_step(model, batch, num_items_in_batch)
        average_flat([], in_place=running_statistics(self.model))
        self.divergence.note_loss(loss)
        self.metrics_buffer.add("loss", loss)
        return loss

    def try_loss(self, rows: int) -> None:
        """Computes the loss on the first rows, and builds the optimizer and the schedule of the whole run, so that
        wrong settings fail before training. Model and random state stay as they are."""
        self.try_settings()
        batch, key = self.streams.first_rows(self.stream, rows)
        self.model.eval()
        with torch.no_grad(), model_randomness(key), self.accelerator.autocast():
            loss = self.model(**batch).loss
        check_first_batch(batch, {"loss": loss})

    def final_model(self) -> PreTrainedModel:
        """Returns the model to keep, in evaluation mode."""
        return self.model.eval()

    def write_final_model(self, folder: str) -> None:
        """Writes the final model, and the processing class beside it."""
        save_model(self.final_model(), folder, self.processing_class)
