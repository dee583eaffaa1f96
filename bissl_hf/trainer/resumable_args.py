"""Arguments that all trainers share: those of `transformers.TrainingArguments`, checked."""

import copy
import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeVar

from transformers import SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from ..optim.optimizers import parse_optimizer_options, resolve_optimizer, takes_momentum
from ..optim.schedule import level_schedule
from ..optim.two_level import LevelSettings
from .data_parallel import COMPILER_VARIABLES, refuse_launcher_settings, refuse_missing_devices
from .fields import REFUSED, REFUSED_IN_SECOND_ORDER, refuse_fields

# Smallest values allowed.
_AT_LEAST = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"), 0),
    **dict.fromkeys(("seed", "data_seed", "dataloader_num_workers", "dataloader_timeout"), 0),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "eval_delay"), 0),
    "ddp_timeout": 1,
}


@contextmanager
def _environment_kept(*names: str) -> Iterator[None]:
    """Undoes what is done to environment variables: transformers 5.23 sets those of the compiler for the whole process
    (2026-11), where later runs would find them; the trainer hands the compiler to Accelerate itself."""
    kept = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_ADAM_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def check_at_least(args: Any, **bounds: float) -> None:
    """Refuses values of fields that are below a bound or not finite; `None` passes.

    Raises:
        `ValueError`: with the field, its value and the bound.
    """
    for name, bound in bounds.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be a finite number of at least {bound}.")


# The last learning rate of the paper's cosine, as a fraction of the first.
_MIN_LR_RATE = 0.001


def _parse_dict(text: str, *, field: str) -> dict[str, Any]:
    def refuse_constant(name: str) -> Any:
        raise ValueError(f"{field} is {text!r}; {name} is no number of JSON.")

    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{field} is {text!r}; it must be a JSON object.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{field} is {text!r}; it must be a JSON object.")
    return value


def checked_options(schedule: str, options: dict[str, Any] | str | None, *, field: str) -> dict[str, Any] | None:
    """Returns the arguments of a schedule: read from JSON, filled in for the paper's cosine, and tried out."""
    if isinstance(options, str):
        options = _parse_dict(options, field=f"{field.removesuffix('_type')}_kwargs")
    if options is None:
        options = default_schedule_options(schedule)
    for name, value in (options or {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.removesuffix('_type')}_kwargs has {name} = {value}; it must be a finite number.")
    level_schedule(schedule, num_steps=1, options=options, field=field)
    return options


def default_schedule_options(schedule: str) -> dict[str, Any] | None:
    """Returns the arguments that a schedule gets when none are given."""
    return {"min_lr_rate": _MIN_LR_RATE} if schedule == SchedulerType.COSINE_WITH_MIN_LR else None


@dataclass
class ResumableTrainingArguments(TrainingArguments):
    """Arguments shared by the trainers of this package.

    They differ from `transformers.TrainingArguments` in this: `optim` takes `"lars"` and any optimizer of
    `torch.optim` by name; weight decay applies to all parameters; `optim_args` reaches every optimizer; momentum is
    0.9 where `optim_args` does not say otherwise; a loss that is not finite is shown instead of hidden; an evaluation
    takes batches of 128.
    """

    refused_fields: ClassVar[dict[str, str]] = REFUSED

    optim: str = field(default="sgd", metadata={"help": "Optimizer: lars or one of torch.optim by name."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr", metadata={"help": "Learning-rate schedule of transformers, by name."}
    )
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log: no, steps or epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: no, steps, epoch or best."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of checkpoints to keep."})
    per_device_eval_batch_size: int = field(
        default=128,
        metadata={"help": "Images per device in an evaluation, and where batch-norm statistics are estimated."},
    )
    on_divergence: str = field(
        default="stop",
        metadata={
            "help": "Where numbers are not finite: stop, with an error; or skip, which leaves out the steps whose "
            "gradients are not finite and waits for the device in each step to know."
        },
    )
    dataloader_timeout: int = field(
        default=600,
        metadata={"help": "Seconds that a step waits for its batch from a loader worker; 0 waits for ever."},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Losses that are not finite are shown."})
    channels_last: bool = field(
        default=False,
        metadata={"help": "Lay images and convolutions out with their channels last: for GPUs in bf16 or fp16."},
    )

    def __post_init__(self) -> None:
        check_at_least(self, **_AT_LEAST)
        if self.on_divergence not in ("stop", "skip"):
            raise ValueError(f"on_divergence is {self.on_divergence!r}; it must be stop or skip.")
        self._refuse_unsupported()
        optim = getattr(self.optim, "value", self.optim)
        resolve_optimizer(optim, field="optim")
        self.optim = optim
        options = {**parse_optimizer_options(self.optim_args, field="optim_args"), **self._adam_options()}
        if takes_momentum(optim, field="optim") and "momentum" not in options:
            options["momentum"] = 0.9
        self.optimizer_options = options
        self.lr_scheduler_kwargs = checked_options(
            self.lr_scheduler_type, self.lr_scheduler_kwargs, field="lr_scheduler_type"
        )
        # The trainers do what it asks for with any signal, and whether it is set or not.
        self.enable_jit_checkpoint = False
        # The base class knows fewer names.
        self.optim = OptimizerNames.SGD
        with _environment_kept(*COMPILER_VARIABLES):
            super().__post_init__()
        self.optim = optim

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether a run takes second derivatives: BiSSL with most solvers."""
        return False

    def _refuse_unsupported(self) -> None:
        refuse_launcher_settings(second_order=self.takes_second_derivatives)
        refuse_missing_devices(uses_cpu=self.use_cpu, backend=self.ddp_backend)
        refuse_fields(self, self.refused_fields)
        if self.takes_second_derivatives:
            refuse_fields(self, REFUSED_IN_SECOND_ORDER)
        if self.do_eval and self.eval_strategy == "no":
            raise ValueError("do_eval is True and eval_strategy 'no'; set eval_strategy to 'epoch' or 'steps'.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}; it must be at least 0 and below 1."
            )

    def _adam_options(self) -> dict[str, Any]:
        """Returns what the fields of Adam add to the options of an optimizer with moments (Adam's relatives).

        Raises:
            `ValueError`: for such fields with another optimizer, or given twice.
        """
        given = {
            name: getattr(self, name) for name, default in _ADAM_DEFAULTS.items() if getattr(self, name) != default
        }
        accepted = inspect.signature(resolve_optimizer(str(self.optim), field="optim")).parameters
        options = parse_optimizer_options(self.optim_args, field="optim_args")
        for name in given:
            option = "eps" if name == "adam_epsilon" else "betas"
            if "betas" not in accepted or option not in accepted:
                raise ValueError(
                    f"{name} is {given[name]}, and optim {self.optim!r} has no such number; leave it out, or set "
                    "optim to adamw."
                )
            if option in options:
                raise ValueError(f"{name} is {given[name]} and optim_args sets {option} too; leave one of them out.")
        found: dict[str, Any] = {"eps": self.adam_epsilon} if "adam_epsilon" in given else {}
        if given.keys() & {"adam_beta1", "adam_beta2"}:
            found["betas"] = (self.adam_beta1, self.adam_beta2)
        return found

    def level(self, name: str = "upper", *, num_steps: int) -> LevelSettings:
        """Returns how a level is optimized; trainers of one level call theirs the upper one.

        Args:
            name (`str`, *optional*, defaults to `"upper"`): `"lower"` for BiSSL only.
            num_steps (`int`): steps of the level in the whole run.

        Raises:
            `ValueError`: for a level that there is not.
        """
        if name != "upper":
            raise ValueError(f"name is {name!r}; {type(self).__name__} have the level 'upper' only.")
        return LevelSettings(
            prefix="",
            optim=self.optim,
            optimizer_options=self.optimizer_options,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            schedule=self.lr_scheduler_type,
            schedule_options=self.lr_scheduler_kwargs,  # type: ignore[arg-type] # read from text by now
            num_steps=num_steps,
            warmup_steps=self.get_warmup_steps(num_steps),
            max_grad_norm=self.max_grad_norm,
        )

    @property
    def key_seed(self) -> int:
        """The seed of everything that is random in a run: `data_seed`, or else `seed`."""
        return self.seed if self.data_seed is None else self.data_seed


ArgumentsType = TypeVar("ArgumentsType", bound=ResumableTrainingArguments)


def with_changes(args: ArgumentsType, **changes: Any) -> ArgumentsType:
    """Returns a copy of training arguments with some fields changed; they are not checked again.

    Raises:
        `TypeError`: for a field that the arguments do not have.
    """
    changed = copy.copy(args)
    for name, value in changes.items():
        if not hasattr(args, name):
            raise TypeError(f"{type(args).__name__} has no field {name!r}.")
        current = getattr(args, name)
        # Strategies are strings for users and enumerations inside.
        setattr(changed, name, type(current)(value) if isinstance(current, Enum) else value)
    return changed
