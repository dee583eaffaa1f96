"""Label smoothing of the downstream loss (`label_smoothing_factor`), which any model that returns logits can have."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_pt_utils import LabelSmoother

_WITHOUT_ONE_CLASS = ("multi_label_classification", "regression")


def check_smoothing(model: PreTrainedModel) -> None:
    """Refuses label smoothing where a label is not one class.

    Raises:
        `ValueError`: with the kind of problem.
    """
    problem = getattr(model.config, "problem_type", None)
    if problem in _WITHOUT_ONE_CLASS or (model.config.num_labels or 0) < 2:
        raise ValueError(
            f"label_smoothing_factor smooths labels of one class each, and {type(model).__name__} has the problem "
            f"type {problem!r} with {model.config.num_labels} outputs; leave it out."
        )


def smoothed_loss(
    outputs: Any, inputs: Mapping[str, Any], smoother: LabelSmoother | None, model: PreTrainedModel
) -> Tensor:
    """Returns the loss of a model's outputs, shape `()`: its own, or  (1 - e) * cross entropy + e * mean over classes
    of -log p,  e the smoothing factor.

    Args:
        outputs (`ModelOutput`): with `loss` and `logits`.
        inputs (`Mapping`): what the model was called with; `labels` are needed to smooth them.
        smoother (`LabelSmoother`, *optional*): Trainer's.
        model (`PreTrainedModel`): a causal language model predicts the next token.
    """
    if smoother is None or "labels" not in inputs:
        loss: Tensor = outputs.loss
        return loss
    is_causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    smoothed: Tensor = smoother(outputs, inputs["labels"], shift_labels=is_causal)
    return smoothed
