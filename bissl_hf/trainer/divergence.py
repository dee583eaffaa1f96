"""Divergence: losses, gradients and weights that are not finite, found without a wait for the device per step."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..checkpoints import find_last_checkpoint
from ..data.alternation import StepKey, Stream
from ..distributed import largest_over_processes
from ..models.finite import not_finite_weights
from ..text import for_terminal

if TYPE_CHECKING:
    from .resumable_trainer import ResumableTrainer

logger = logging.getLogger(__name__)

_NEVER = 2**62


class DivergenceError(RuntimeError):
    """The run has reached numbers that are not finite, and there is no point in going on."""


class DivergenceGuard(TrainerCallback):
    """Notes on the device the first step whose loss or gradient is not finite, and reads that note where the run waits
    for the device anyway: at the end of an epoch (of BiSSL: an alternation), and before a log, an evaluation and a
    checkpoint. There the weights are looked at, too, so that what is written is finite.

    With `on_divergence="skip"` each step waits for its gradient: if that is not finite the step is left out, with what
    it did to running statistics and figures. The gradient is the average over processes, so all of them leave out the
    same steps. The steps that the loss scale of fp16 skips are none of these.

    Args:
        trainer ([`ResumableTrainer`])

    Attributes:
        raises (`bool`): whether a divergence is an error; else the training ends there, as in the trials of a search.
        found (`str`, *optional*): what was found, as a sentence.
        skipped (`int`): steps left out so far.
    """

    def __init__(self, trainer: "ResumableTrainer") -> None:
        self.trainer = trainer
        self.raises = True
        self.found: str | None = None
        self.skipped = self._skipped_since = 0
        self._keys: dict[int, StepKey] = {}
        self._first_loss: Tensor | None = None  # global step, shape ()
        self._first_gradient: Tensor | None = None
        self._before: tuple[dict[str, Tensor], Any] | None = None

    @property
    def skips(self) -> bool:
        """Whether steps with a gradient that is not finite are left out."""
        return self.trainer.args.on_divergence == "skip"

    # In each step

    def begin_step(self, key: StepKey) -> None:
        """Takes note of the batch of a step, and of what the step may have to give back."""
        self._keys[self.trainer.state.global_step] = key
        if self.skips:
            buffers = {name: buffer.clone() for name, buffer in self.trainer.model.named_buffers()}
            self._before = (buffers, self.trainer.metrics_buffer.copy_state())

    def note_loss(self, loss: Tensor) -> None:
        """Takes note of the loss of a step, shape `()`; it stays on the device."""
        if not self.skips:
            self._first_loss = self._earlier(self._first_loss, loss)

    def note_gradient(self, size: Tensor) -> bool:
        """Takes note of the gradient norm of a step, shape `()`, the same on each process.

        Returns:
            `bool`: whether the step is left out; its gradients are gone then.
        """
        if self.trainer.loss_scale.is_active:
            return False
        if not self.skips:
            self._first_gradient = self._earlier(self._first_gradient, size)
            return False
        if bool(size.isfinite()):
            return False
        self._undo_step()
        return True

    def _earlier(self, first: Tensor | None, value: Tensor) -> Tensor:
        """The present step if `value` is not finite and none was before it."""
        step = torch.where(value.detach().isfinite(), _NEVER, self.trainer.state.global_step)
        return step if first is None else torch.minimum(first.to(step.device), step)

    @torch.no_grad()
    def _undo_step(self) -> None:
        model = self.trainer.model
        for parameter in model.parameters():
            parameter.grad = None
        if self._before is not None:
            buffers, figures = self._before
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            self.trainer.metrics_buffer.restore(figures)
        self.skipped += 1
        self._skipped_since += 1

    # Where the run waits anyway

    def check(self) -> None:
        """Reads the notes, and looks at the weights.

        Raises:
            [`DivergenceError`]: on each process, if anything was not finite on any of them.
        """
        if self._skipped_since and self.trainer.is_world_process_zero():
            logger.warning(
                "%d of %d steps were left out since the last message, because their gradients were not finite; %d in "
                "this run so far.", self._skipped_since, len(self._keys), self.skipped,
            )  # fmt: skip
        self._skipped_since = 0
        device = self.trainer.args.device
        steps = {
            cause: -largest_over_processes(-(_NEVER if first is None else int(first)), device)
            for cause, first in (("loss", self._first_loss), ("gradient", self._first_gradient))
        }
        cause = min(steps, key=steps.__getitem__)  # of one step the loss, which comes first
        step = steps[cause]
        self._first_loss = self._first_gradient = None
        damaged = not_finite_weights(self.trainer.model)
        if step == _NEVER and not largest_over_processes(len(damaged), device):
            self._keys = {}
            return
        if step < _NEVER:
            where, what = self._place(step), self._cause(step, cause)
        else:
            where, what = self._place(self.trainer.state.global_step - 1), f"the weights ({', '.join(damaged[:3])})"
        self.found = f"The training diverged in {where}: {what} is not finite."
        if what.startswith("the weights"):
            self.found = self.found.replace(" is not finite", " are not finite")
        if self.raises:
            raise DivergenceError(f"{self.found} {self._advice()}")

    def _place(self, step: int) -> str:
        """Names a step as its user counts: from 1."""
        key = self._keys.get(step)
        if key is None:
            return f"step {step + 1}"
        if not hasattr(self.trainer.args, "num_alternations"):
            return f"step {step + 1} of epoch {key.alternation + 1}"
        level = Stream(key.stream).level
        return f"{level} step {key.step + 1} of alternation {key.alternation + 1} (step {step + 1} of the run)"

    def _cause(self, step: int, cause: str) -> str:
        """What was not finite first: the data if they were read so, which is found out by reading them again."""
        key, named = self._keys.get(step), 0
        fields: list[str] = []
        if key is not None:
            fields = [
                f"{name} of the batch"
                for inputs in self.trainer.inputs_of_step(key)
                for name in not_finite_inputs(inputs)
            ]
            named = len(fields)
        if largest_over_processes(named, self.trainer.args.device):
            return f"the input ({', '.join(fields) or 'of another process'})"
        return f"the {cause}"

    def _advice(self) -> str:
        """How to go on."""
        checkpoint, _ = find_last_checkpoint(str(self.trainer.args.output_dir))
        kept = (
            f"The last checkpoint from before is {for_terminal(checkpoint)}." if checkpoint else "Nothing was saved."
        )
        ways = "lower the learning rate, bound the gradient norm (max_grad_norm)"
        return f"{kept} To go on {ways} or set on_divergence to skip; data that are not finite must be mended."

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if control.should_log or control.should_evaluate or control.should_save:
            return self._checked(control)
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self._checked(control)

    def _checked(self, control: Any) -> Any:
        self.check()
        if self.found is not None:
            control.should_training_stop = True
            control.should_log = control.should_evaluate = control.should_save = False
        return control

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found, self._keys = None, {}
        if state.global_step == 0:
            self.skipped = 0

    # For a resume

    def state_dict(self) -> dict[str, Any]:
        """Returns how many steps were left out."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on counting."""
        self.skipped = state["skipped"]


def not_finite_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """Returns the names of the tensors of a batch that hold NaN or infinity."""
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all())
    ]


def check_first_batch(inputs: Mapping[str, Any], losses: Mapping[str, Tensor]) -> None:
    """Refuses a start from which every loss would be NaN.

    Args:
        inputs (`Mapping`): the first rows, transformed.
        losses (`Mapping[str, torch.Tensor]`): losses on them by name, shape `()`.

    Raises:
        `ValueError`: with what is not finite.
    """
    if names := not_finite_inputs(inputs):
        raise ValueError(f"The first examples hold NaN or infinity in {', '.join(names)}; mend or leave them out.")
    for name, loss in losses.items():
        if not bool(loss.isfinite()):
            raise ValueError(
                f"The {name} on the first examples is {float(loss)} before any training. Check the data, the weights "
                "that the run starts from, and the temperature of the loss."
            )


def check_metrics(metrics: Mapping[str, Any], *, of: str) -> None:
    """Refuses the evaluation of a model that has diverged.

    Args:
        metrics (`Mapping`): figures by name.
        of (`str`): what was evaluated, for the message.

    Raises:
        [`DivergenceError`]: with the figures that are not finite.
    """
    bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
        raise DivergenceError(
            f"The evaluation of {of} is not finite ({', '.join(bad)}), so it is not kept as a result. Lower the "
            "learning rate or bound the gradient norm, and train it anew."
        )
