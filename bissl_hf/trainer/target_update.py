"""The moving target of a pretext model, updated after each step of its optimizer."""

from typing import Any

from transformers import TrainerCallback


class TargetUpdate(TrainerCallback):
    """Calls `model.update_target(step, total_steps)` after each optimizer step of a training with one model. It
    remembers nothing: the target is part of the model and of its checkpoints.

    Args:
        model (`PreTrainedModel`): with the method `update_target`, such as [`BYOLForPreTraining`].
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the target."""
        self.model.update_target(state.global_step, state.max_steps)
