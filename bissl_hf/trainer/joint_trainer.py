"""Joint training of both tasks on one backbone: the rival of BiSSL that needs no linear solve."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, default_data_collator
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils.generic import find_labels

from ..cards.record import RunRecord
from ..data.alternation import KeyedSource, StepKey, Stream
from ..data.decoded import decoded_for
from ..data.streams import Inputs, Transform, check_pretext_batch, labelled_batch_size, model_randomness
from ..distributed import average_flat
from ..models.batch_norm import check_rows_for_batch_norm, has_batch_norm, recalibrate_batch_norm, running_statistics
from ..models.modeling_bissl import BiSSLModel
from ..tasks.class_weights import DownstreamLoss
from ..tasks.image_task import ImageTask
from .divergence import check_first_batch
from .from_task import filled_from_task
from .given import check_arguments, check_rows, refuse_loss_hooks
from .run_record import record_run, size_of
from .single_level_trainer import SingleLevelTrainer
from .target_update import TargetUpdate
from .training_args import JointTrainingArguments


class JointTrainer(SingleLevelTrainer):
    """Minimises L_P(theta_P, phi_P) + w L_D(theta_P, phi_D): each step takes a batch of both tasks. theta_D is not
    used.

    Batch norm is as in BiSSL: the running statistics are those of the pretext views, and the downstream loss is
    computed in train mode on copies of them.

    Args:
        model ([`BiSSLModel`]): theta_D is frozen in it.
        args ([`JointTrainingArguments`])
        task ([`ImageTask`], *optional*): data, transforms, metrics and image processor; what is given beside it counts
            in its place.
        train_dataset: labelled, map-style data set.
        lower_dataset: map-style data set of the pretext task, one pass over which is an epoch.
        data_collator, lower_data_collator (`Callable`, *optional*): stack labelled rows and rows of the pretext task
            into a dictionary of tensors.
        train_transform, lower_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`, run on the
            device and deterministic in the key.
        class_weights (`str` or `Sequence[float]`, *optional*): of the downstream loss, see [`DownstreamLoss`].
        **trainer_kwargs: further arguments of `transformers.Trainer`.

    Raises:
        `ValueError`: if a data set is smaller than its task's batch can be, or a process takes one row with batch
            norm.
    """

    args: JointTrainingArguments
    model: BiSSLModel

    @filled_from_task(ImageTask.bilevel_arguments)
    def __init__(
        self,
        model: BiSSLModel,
        args: JointTrainingArguments,
        *,
        task: ImageTask | None = None,
        train_dataset: Any = None,
        lower_dataset: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        lower_data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_transform: Transform | None = None,
        lower_transform: Transform | None = None,
        class_weights: str | Sequence[float] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        check_arguments(args, JointTrainingArguments, JointTrainer)
        refuse_loss_hooks(type(self), JointTrainer, trainer_kwargs, "override joint_loss(pretext, key)")
        lower_dataset = decoded_for(lower_dataset, lower_transform, labelled=False)
        train_dataset = decoded_for(train_dataset, train_transform)
        for parameter in model.backbone_parameters("upper"):
            parameter.requires_grad_(False)
        batch = args.per_device_train_batch_size * args.world_size
        check_pretext_batch(batch, lower_dataset, name="lower_dataset", field="per_device_train_batch_size")
        labelled_batch = labelled_batch_size(args.per_device_labelled_batch_size, args.world_size, train_dataset)
        for level, rows, field in (
            (model.lower, batch, "per_device_train_batch_size"),
            (model.upper, labelled_batch, "per_device_labelled_batch_size"),
        ):
            check_rows_for_batch_norm(level, rows // args.world_size, what=field)
        super().__init__(
            model=model,
            args=args,
            role="pretext",
            stream=Stream.LOWER,
            batch_size=batch,
            train_dataset=lower_dataset,
            train_transform=lower_transform,
            **trainer_kwargs,
        )
        # Not by the signature of BiSSLModel, which takes anything.
        self.source.collator = self.dropping_columns(lower_data_collator or default_data_collator, model.lower)
        self.data_collator = self.dropping_columns(data_collator or default_data_collator, model.upper)
        labelled_batch = labelled_batch_size(args.per_device_labelled_batch_size, args.world_size, train_dataset)
        check_rows(train_dataset, name="train_dataset", transform="train_transform", labelled_for=model.upper)
        self.downstream_loss = DownstreamLoss(class_weights, config=model.upper.config, dataset=train_dataset)
        labelled = KeyedSource(
            train_dataset,
            labelled_batch,
            self.data_collator,
            steps_per_alternation=self.source.steps_per_alternation,
            world_size=args.world_size,
        )
        self.streams.add(Stream.UPPER, labelled, train_transform)
        if hasattr(model.lower, "update_target"):
            self.add_callback(TargetUpdate(model.lower))
        if args.label_names is None:
            self.label_names = find_labels(type(model.upper))

    def joint_loss(self, pretext: Inputs, key: StepKey) -> Tensor:
        """Returns the loss of a step, shape `()`.

        Args:
            pretext (`dict`): the pretext views.
            key ([`StepKey`]): of the step, which also names the labelled batch.
        """
        labelled_key = key._replace(stream=int(Stream.UPPER))
        labelled = self.streams.read(labelled_key)
        with model_randomness(key):
            loss = self.model(level="lower", **pretext).loss
        with model_randomness(labelled_key):
            downstream = self.downstream_loss(partial(self.model, level="aligned"), labelled)
        return loss + self.args.downstream_weight * downstream

    def backbone_and_heads(self) -> tuple[list[Tensor], list[Tensor]]:
        """Returns theta_P, and the heads of both tasks."""
        heads: list[Tensor] = [*self.model.head_parameters("lower"), *self.model.head_parameters("upper")]
        return list(self.model.backbone_parameters("lower")), heads

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Computes the gradient of both losses and averages it over the processes."""
        key = inputs["key"]
        self.divergence.begin_step(key)
        pretext = self.streams.prepare(inputs["inputs"], key)
        self.count_samples(pretext)
        self.model.train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with self.accelerator.autocast():
            loss = self.joint_loss(pretext, key)
        gradient = torch.autograd.grad(self.loss_scale(loss), parameters)
        gradient = average_flat(gradient, in_place=running_statistics(self.model.lower))
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value
        self.divergence.note_loss(loss)
        self.metrics_buffer.add("loss", loss.detach())
        return loss.detach()

    def first_gradients(self) -> list[Tensor | None]:
        """None: DDP has no part in this training."""
        return []

    def try_loss(self, rows: int) -> None:
        """Computes both losses on the first rows, see [`SingleLevelTrainer.try_loss`]."""
        self.try_settings()
        batch, key = self.streams.first_rows(self.stream, rows)
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            loss = self.joint_loss(batch, key._replace(rank=self.args.process_index))
        check_first_batch(batch, {"loss": loss})

    def inputs_of_step(self, key: StepKey) -> list[Inputs]:
        """Returns both batches of a step."""
        return [self.streams.read(key), self.streams.read(key._replace(stream=int(Stream.UPPER)))]

    def resume_settings(self) -> dict[str, Any]:
        """Adds what the labelled stream reads."""
        own = {"class_weights": self.downstream_loss.describe()}
        return {**super().resume_settings(), "downstream": self.streams.sources[Stream.UPPER].describe(), **own}

    # Evaluation, and what users take away

    def final_model(self) -> PreTrainedModel:
        """Returns a native copy of the downstream model, the shared backbone with its head, its batch-norm statistics
        estimated on labelled training images."""
        model = self.model.aligned_model()
        if has_batch_norm(model) and self.args.bn_recalibration_images:
            source = self.streams.sources[Stream.UPPER]
            recalibrate_batch_norm(model, self.calibration_batches(self.args.bn_recalibration_images, source))
        return model.eval()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Has Trainer report the downstream loss that is trained in evaluations."""
        loss, outputs = self.downstream_loss.with_outputs(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluates the final model."""
        with self.evaluating(self.final_model()):
            return super().evaluation_loop(*args, **kwargs)

    def record(self) -> RunRecord:
        """Returns what a card says of the run and of the downstream model."""
        labelled = self.streams.sources[Stream.UPPER].dataset
        return record_run(self, "joint", examples={"train": size_of(labelled), "lower": size_of(self.train_dataset)})
