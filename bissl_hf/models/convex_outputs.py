"""In which of their outputs the losses of lower models are convex, which is what a Gauss-Newton matrix needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, ViTMAEForPreTraining

from ..tensors import at_least_float32
from .mae import masked_error

Inputs = dict[str, Any]
# Losses of transformers that are the cross-entropy of `logits` and `labels`, mean over the labels that are not -100.
_CROSS_ENTROPY = ("ForMaskedLM", "ForImageClassification", "ForSequenceClassification", "ForTokenClassification")


@dataclass(frozen=True)
class ConvexOutputs:
    """How the loss of a batch follows from outputs in which it is convex.

    Args:
        rows (`Callable`): `rows(model, part)` returns what the model makes of a part of the batch, shape
            `(rows, ...)`, with a call of the model as a whole.
        join (`Callable`, *optional*): makes the outputs from the rows of the whole batch; the rows themselves if not
            given.
        loss (`Callable`): `loss(outputs, inputs)` of the whole batch, shape `()`.
    """

    rows: Callable[[Callable[..., Any], Inputs], Tensor]
    loss: Callable[[Tensor, Inputs], Tensor]
    join: Callable[[Tensor], Tensor] | None = None


def convex_outputs(model: PreTrainedModel) -> ConvexOutputs | None:
    """Returns the outputs in which the loss of a pretext model is convex, or `None` where none are known.

    A model says so by two methods: `outputs_from_embeddings(embeddings)` and `loss_from_outputs(outputs)`, of the
    embeddings that its forward pass returns with `return_loss=False`. Of the native models of transformers those are
    known whose loss is the cross-entropy of their logits, and masked autoencoders.
    """
    own: Any = model
    if hasattr(model, "outputs_from_embeddings") and hasattr(model, "loss_from_outputs"):
        return ConvexOutputs(
            rows=lambda call, part: at_least_float32(call(**part, return_loss=False).embeddings),
            join=own.outputs_from_embeddings,
            loss=lambda outputs, inputs: own.loss_from_outputs(outputs),
        )
    if isinstance(model, ViTMAEForPreTraining):
        return ConvexOutputs(
            rows=_masked_predictions, loss=lambda outputs, inputs: _masked_error(own, outputs, inputs)
        )
    regression = getattr(model.config, "problem_type", None) in ("regression", "multi_label_classification")
    if type(model).__module__.startswith("transformers.") and type(model).__name__.endswith(_CROSS_ENTROPY):
        return None if regression else ConvexOutputs(rows=_logits, loss=_cross_entropy)
    return None


def _logits(call: Callable[..., Any], part: Inputs) -> Tensor:
    return at_least_float32(call(**part).logits)


def _cross_entropy(logits: Tensor, inputs: Inputs) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), inputs["labels"].flatten(), ignore_index=-100)


def _masked_predictions(call: Callable[..., Any], part: Inputs) -> Tensor:
    """Predictions of each patch with the mask that was drawn for it, shape `(rows, patches, values + 1)`."""
    outputs = call(**part)
    return torch.cat([at_least_float32(outputs.logits), outputs.mask.unsqueeze(-1)], dim=-1)


def _masked_error(model: Any, outputs: Tensor, inputs: Inputs) -> Tensor:
    return masked_error(model, inputs["pixel_values"], outputs[..., :-1], outputs[..., -1].detach())
