"""Evaluation of both levels as native models of the downstream class."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from ..data.alternation import (
    READING_RANDOMNESS,
    KeyedSource,
    StepKey,
    Stream,
    batch_indices,
    keyed_random_state,
    read_rows,
)
from ..models.batch_norm import has_batch_norm, recalibrate_batch_norm
from ..models.modeling_bissl import BiSSLModel
from .keyed_trainer import KeyedTrainer
from .training_args import BiSSLTrainingArguments


class LevelEvaluation(KeyedTrainer):
    """The part of [`BiSSLTrainer`] that evaluates: `eval_*` is the aligned model, `eval_upper_*` that of (theta_D,
    phi_D)."""

    args: BiSSLTrainingArguments
    model: BiSSLModel
    sources: dict[Stream, KeyedSource]
    _evaluated: nn.Module | None = None

    def aligned_model(self) -> nn.Module:
        """Returns a native copy of the aligned model (theta_P with phi_D), its batch-norm statistics estimated anew on
        downstream training images."""
        model = self.model.aligned_model()
        if has_batch_norm(model) and self.sources and self.args.bn_recalibration_images:
            recalibrate_batch_norm(model, self.recalibration_batches())
        return model.eval()

    def recalibration_batches(self) -> Iterator[dict[str, Any]]:
        """Yields the batches for `aligned_model`: the same training examples in each call and on each process, with
        the evaluation transform."""
        total = min(self.args.bn_recalibration_images, len(self.train_dataset))
        if total == 0:
            return
        batch = min(self.args.per_device_eval_batch_size, total)
        for position in range(total // batch):
            key = StepKey(self.args.key_seed, int(Stream.EVALUATION), 0, position, 0)
            rows = batch_indices(len(self.train_dataset), batch, position, seed=key.seed, level=key.level)
            with keyed_random_state((*key, READING_RANDOMNESS)):
                inputs = self.data_collator(read_rows(self.train_dataset, rows))
            yield self.move_and_transform(inputs, key, self.eval_transform)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Runs the aligned model, and in an evaluation the upper one too, as `{prefix}_upper_*`."""
        prefix = kwargs.pop("metric_key_prefix", "eval")
        output = self._evaluate_model(
            self.aligned_model(), dataloader, description, *args, metric_key_prefix=prefix, **kwargs
        )
        if description == "Evaluation" and output.metrics is not None:
            upper = copy.deepcopy(self.model.upper).eval()
            second = self._evaluate_model(
                upper, dataloader, description, *args, metric_key_prefix=f"{prefix}_upper", **kwargs
            )
            output.metrics.update(second.metrics or {})
        return output

    def _evaluate_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluated = model
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._evaluated = None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Uses the native model under evaluation in the place of the one that holds both levels."""
        with self.accelerator.autocast():
            return super().prediction_step(self._evaluated or model, inputs, prediction_loss_only, ignore_keys)
