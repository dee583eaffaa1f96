"""Supervised fine-tuning, the stage after BiSSL."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..data.alternation import Stream
from ..data.decoded import decoded_for
from ..data.streams import labelled_batch_size
from ..models.adapters import adapter_of, merged
from ..models.batch_norm import check_rows_for_batch_norm, has_batch_norm, recalibrate_batch_norm
from ..tasks.class_weights import DownstreamLoss
from ..tasks.image_task import ImageTask
from .from_task import filled_from_task
from .given import check_arguments, check_rows, evaluate_nothing_without_data
from .single_level_trainer import SingleLevelTrainer
from .smoothing import check_smoothing
from .training_args import FineTuningArguments


class FineTuneTrainer(SingleLevelTrainer):
    """Trains a classifier, backbone and head, on labelled examples. A batch larger than the data is cut to them.

    Batch-norm statistics do not depend on where the model comes from: they are estimated on training examples before
    the first step, and `batch_norm="recalibrated"` estimates them once more for evaluation and for the final model, on
    a copy.

    Args:
        args ([`FineTuningArguments`])
        task ([`ImageTask`], *optional*): data, transforms, metrics and image processor; what is given beside it counts
            in its place.
        train_dataset: labelled, map-style data set.
        eval_dataset (*optional*): likewise; without one nothing is evaluated in training.
        class_weights (`str` or `Sequence[float]`, *optional*): of the loss, see [`DownstreamLoss`].
        **trainer_kwargs: further arguments of [`SingleLevelTrainer`] (`train_transform`, ...), [`ResumableTrainer`]
            (`eval_transform`) and `transformers.Trainer` (`model` or `model_init`, `compute_metrics`, ...).

    Raises:
        `ValueError`: if there is no training example for each process, or a process takes one row with batch norm.
    """

    args: FineTuningArguments

    @filled_from_task(ImageTask.downstream_arguments)
    def __init__(
        self,
        *,
        args: FineTuningArguments,
        task: ImageTask | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        class_weights: str | Sequence[float] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        check_arguments(args, FineTuningArguments, FineTuneTrainer)
        train_dataset = decoded_for(train_dataset, trainer_kwargs.get("train_transform"))
        evaluate_nothing_without_data(args, eval_dataset)
        super().__init__(
            args=args,
            role="downstream",
            stream=Stream.UPPER,
            batch_size=labelled_batch_size(args.per_device_train_batch_size, args.world_size, train_dataset),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **trainer_kwargs,
        )
        rows = self.source.batch_size // args.world_size
        check_rows_for_batch_norm(self.model, rows, what="per_device_train_batch_size")
        check_rows(train_dataset, name="train_dataset", transform="train_transform", labelled_for=self.model)
        if args.label_smoothing_factor:
            check_smoothing(self.model, class_weights)
        self.downstream_loss = DownstreamLoss(class_weights, config=self.model.config, dataset=train_dataset)
        self.add_callback(_StartBatchNorm(self))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Returns the loss, with class weights where they were asked for."""
        if self.downstream_loss.weights is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self.downstream_loss.with_outputs(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def resume_settings(self) -> dict[str, Any]:
        """Adds the class weights."""
        return {**super().resume_settings(), "class_weights": self.downstream_loss.describe()}

    def final_model(self) -> PreTrainedModel:
        """Returns the model to evaluate and to keep, in evaluation mode: the trained one, or a copy with its
        batch-norm statistics estimated anew, or with its adapters merged into the weights that they adapt."""
        recalibrates = self.args.batch_norm != "running" and has_batch_norm(self.model)
        if not recalibrates and adapter_of(self.model) is None:
            return self.model.eval()
        model = merged(copy.deepcopy(self.model))
        if not recalibrates:
            return model.eval()
        recalibrate_batch_norm(model, self.calibration_batches(self.args.bn_recalibration_images))
        return model.eval()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluates the final model."""
        with self.evaluating(self.final_model()):
            return super().evaluation_loop(*args, **kwargs)

    def start_batch_norm(self) -> None:
        """Estimates batch-norm statistics on training examples, so that no statistics of another stage are left;
        not where `bn_recalibration_images` is 0."""
        if self.args.bn_recalibration_images:
            recalibrate_batch_norm(self.model, self.calibration_batches(self.args.bn_recalibration_images))


class _StartBatchNorm(TrainerCallback):
    """Brings the batch norm into its first state where training begins, and not where it is resumed."""

    def __init__(self, trainer: FineTuneTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.start_batch_norm()
