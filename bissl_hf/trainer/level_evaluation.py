"""Evaluation of both levels as native models of the downstream class."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from ..data.alternation import KeyedSource, Stream
from ..models.batch_norm import has_batch_norm, recalibrate_batch_norm
from ..models.modeling_bissl import BiSSLModel
from .resumable_trainer import ResumableTrainer
from .training_args import BiSSLTrainingArguments


class LevelEvaluation(ResumableTrainer):
    """The part of [`BiSSLTrainer`] that evaluates: `eval_*` is the aligned model, `eval_upper_*` that of (theta_D,
    phi_D)."""

    args: BiSSLTrainingArguments
    model: BiSSLModel
    sources: dict[Stream, KeyedSource]

    def aligned_model(self) -> nn.Module:
        """Returns a native copy of the aligned model (theta_P with phi_D), its batch-norm statistics estimated anew on
        downstream training images."""
        model = self.model.aligned_model()
        if has_batch_norm(model) and self.sources and self.args.bn_recalibration_images:
            recalibrate_batch_norm(model, self.recalibration_batches())
        return model.eval()

    def recalibration_batches(self) -> Iterator[dict[str, Any]]:
        """Yields the batches for `aligned_model`, see [`~ResumableTrainer.calibration_batches`]."""
        return self.calibration_batches(self.args.bn_recalibration_images)

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
        with self.evaluating(model):
            return super().evaluation_loop(*args, **kwargs)
