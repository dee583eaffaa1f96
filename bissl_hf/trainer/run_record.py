"""The record of a run, from which its card is made."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from transformers import TrainingArguments

from ..cards.record import RunRecord, Settings, installed_versions, record_model, settings_of
from ..models.modeling_bissl import BiSSLModel
from .resumable_args import default_schedule_options

if TYPE_CHECKING:
    from .resumable_trainer import ResumableTrainer

# Fields of `transformers.TrainingArguments` itself that decide what a run computes.
_COMPUTED = (
    "seed", "data_seed", "bf16", "tf32", "full_determinism", "max_steps", "num_train_epochs", "warmup_steps",
    "optim_args", "lr_scheduler_kwargs", "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip
# Fields of this package's arguments that decide what is seen of a run.
_OBSERVED = ("logging_", "save_", "eval_", "hub_", "push_", "report_")
_UPPER = (
    "learning_rate", "weight_decay", "optim", "optim_args", "max_grad_norm", "per_device_train_batch_size",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "upper_micro_batch_size",
)  # fmt: skip


def record_run(trainer: "ResumableTrainer", kind: str, *, examples: Mapping[str, int | None]) -> RunRecord:
    """Returns the record of a trainer's run so far.

    Args:
        trainer ([`ResumableTrainer`]): its model, arguments, state and logs are read.
        kind (`str`): see [`RunRecord`].
        examples (`Mapping[str, int | None]`): sizes of the data sets beside that of evaluation.
    """
    args, state, model, processor = trainer.args, trainer.state, trainer.model, trainer.processing_class
    pair = {"upper": model.upper, "lower": model.lower} if isinstance(model, BiSSLModel) else {"model": model}
    sizes = {**examples, "eval": size_of(trainer.eval_dataset)}
    return RunRecord(
        kind=kind,
        models={
            name: record_model(part, processor if name != "lower" else None)  # the processor is that of the user's
            for name, part in pair.items()
        },
        arguments={name: getattr(args, name) for name in args.__dataclass_fields__},
        arguments_class=type(args).__name__,
        settings=settings_by_part(args),
        examples={name: size for name, size in sizes.items() if size is not None},
        log_history=list(state.log_history),
        steps=state.global_step,
        best_step=state.best_global_step if args.load_best_model_at_end else None,
        seconds=trainer.training_seconds,
        repository=trainer.hub_model_id or args.hub_model_id,
        num_processes=args.world_size,
        device=args.device.type,
        versions=installed_versions(),
    )


def size_of(dataset: object) -> int | None:
    """Returns the number of rows of a data set that has one."""
    return len(dataset) if hasattr(dataset, "__len__") else None


def settings_by_part(args: TrainingArguments) -> dict[str, Settings]:
    """Returns the arguments that decide what a run computes, by the part of the run, in the order in which a card
    lists them."""
    names = _computing_fields(args)
    two_levels = hasattr(args, "num_alternations")
    order = ("Both levels", "Lower level", "Upper level") if two_levels else ("Training",)
    fields_of = {part: {name for name in names if _part(name, args) == part} for part in order}
    parts = {part: settings_of(args, included.__contains__) for part, included in fields_of.items()}
    return {part: _with_schedule_defaults(settings, args) for part, settings in parts.items()}


def _with_schedule_defaults(settings: Settings, args: TrainingArguments) -> Settings:
    """Fills in the arguments that a schedule gets when none are given."""
    defaults = {
        name: default_schedule_options(getattr(args, name.replace("_kwargs", "_type")))
        if name.endswith("lr_scheduler_kwargs") and value is None
        else value
        for name, value in settings.defaults.items()
    }
    return Settings(settings.values, defaults)


def _computing_fields(args: TrainingArguments) -> set[str]:
    own = {
        name
        for kind in type(args).__mro__
        if kind.__module__.split(".")[0] == __package__.split(".")[0]
        for name in vars(kind).get("__annotations__", {})
        if not name.startswith(_OBSERVED)
    }
    computing = own | set(_COMPUTED)
    # These follow from the number of alternations.
    return computing - {"num_train_epochs", "max_steps"} if "num_alternations" in computing else computing


def _part(name: str, args: TrainingArguments) -> str:
    if not hasattr(args, "num_alternations"):
        return "Training"
    if name in _UPPER:
        return "Upper level"
    lower = name.startswith(("lower_", "per_device_lower_")) and name != "lower_steps"
    return "Lower level" if lower else "Both levels"
