"""What `--help` of a command shows: its own fields in groups, and on request those of transformers too."""

from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from ..trainer.fields import REFUSED_BY_ALTERNATIONS

HELP_FLAGS = ("-h", "--help")
# Fields of transformers that most runs may want to set; the others are listed by `--help all`.
_COMMON = frozenset(
    (
        *(
            "output_dir",
            "resume_from_checkpoint",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "report_to",
            "run_name",
        ),
        *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_strategy", "disable_tqdm"),
        *("load_best_model_at_end", "metric_for_best_model", "optim_args", "lr_scheduler_kwargs", "warmup_steps"),
        *("num_train_epochs", "max_steps", "seed", "data_seed", "bf16", "fp16", "use_cpu", "dataloader_num_workers"),
    )
)
OUTPUT_GROUP, REST_GROUP = "output and Hub", "the rest"
_OUTPUT = (
    *("output", "resume_from", "save_", "load_best", "logging_", "report_to", "run_name", "plan", "license"),
    *("push_to_hub", "hub_", "disable_tqdm", "eval_s", "metric_for"),
)
_MACHINE = (
    *("seed", "data_seed", "bf16", "fp16", "channels_last", "use_cpu", "dataloader_num_workers"),
    *("per_device_eval_batch_size", "dataloader_timeout", "on_divergence"),
)
_OPTIMIZATION = (
    *(
        "optim",
        "learning_rate",
        "lr_",
        "weight_decay",
        "warmup_",
        "max_grad_norm",
        "momentum",
        "micro_batch_size",
    ),
    *(
        "gradient_cache",
        "per_device_train",
        "per_device_lower",
        "per_device_labelled",
        "num_train_epochs",
        "max_steps",
    ),
)
_GROUP_OF_CLASS = {
    **dict.fromkeys(
        ("DataArguments", "LowerDataArguments", "PretextDataArguments", "TextArguments", "LossArguments"), "data"
    ),
    **dict.fromkeys(("CropArguments", "ViewArguments"), "views"),
    **dict.fromkeys(
        ("PretextModelArguments", "ModelArguments", "StartArguments", "FineTuneModelArguments", "JointModelArguments"),
        "models",
    ),
}
GROUPS = (
    *("this command", "data", "views", "models", "pre-training", "bilevel", "optimization"),
    *("optimization of the lower level", "optimization of the upper level", OUTPUT_GROUP, REST_GROUP),
)


def group_fields(dataclass_types: Sequence[Any], *, show_all: bool = False) -> dict[str, list[str]]:
    """Groups the fields of a command.

    Args:
        dataclass_types (`Sequence`): the dataclasses of its arguments.
        show_all (`bool`, *optional*, defaults to `False`): whether fields that are transformers' alone, and of no use
            to most runs, are in the last group.

    Returns:
        `dict[str, list[str]]`: names of fields by the title of the group; without fields that are refused.
    """
    groups: dict[str, list[str]] = {title: [] for title in GROUPS}
    placed: set[str] = set()
    for kind in dataclass_types:
        bilevel = any(field.name == "num_alternations" for field in fields(kind))
        for field in fields(kind):
            title = _group_of(kind, field.name, bilevel=bilevel, show_all=show_all)
            if field.init and title is not None and field.name not in placed:
                groups[title].append(field.name)
                placed.add(field.name)
    return {title: names for title, names in groups.items() if names}


def _group_of(kind: type, name: str, *, bilevel: bool, show_all: bool) -> str | None:
    """Returns the title of the group of a field, or `None` if it is not shown."""
    is_trainer_field = issubclass(kind, TrainingArguments)
    if name in getattr(kind, "refused_fields", ()) or (bilevel and name in REFUSED_BY_ALTERNATIONS):
        return None
    if is_trainer_field and name not in _COMMON and not _is_own(kind, name):
        return REST_GROUP if show_all else None
    if name in _MACHINE:
        return REST_GROUP
    if name.startswith(_OUTPUT):
        return OUTPUT_GROUP
    if not is_trainer_field:
        return "pre-training" if name.startswith("pretrain_") else _GROUP_OF_CLASS.get(kind.__name__, "this command")
    if name.removeprefix("lower_").removeprefix("upper_").startswith(_OPTIMIZATION):
        lower = name.startswith(("lower_", "per_device_lower"))
        return f"optimization of the {'lower' if lower else 'upper'} level" if bilevel else "optimization"
    return "bilevel" if bilevel else "this command"


def _is_own(kind: type, name: str) -> bool:
    """Whether a class of this package, and not only one of transformers, declares a field."""
    owners = [owner for owner in kind.__mro__ if name in vars(owner).get("__annotations__", {})]
    return bool(owners) and not issubclass(TrainingArguments, owners[0])


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Shows an argument once, and its default where it has one."""

    def _format_action_invocation(self, action: Action) -> str:
        default = self._get_default_metavar_for_optional(action)
        return f"--{action.dest} {self._format_args(action, default)}".strip()

    def _get_help_string(self, action: Action) -> str | None:
        nothing = action.default in (None, "", SUPPRESS)
        return action.help if nothing else super()._get_help_string(action)


def format_grouped_help(parser: ArgumentParser, groups: dict[str, list[str]], *, shows_all: bool) -> str:
    """Returns the usage, the description and the arguments of a parser in groups."""
    actions: dict[str, list[Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    formatter = parser._get_formatter()
    formatter.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    formatter.add_text(parser.description)
    grouped = {"configuration": ["config"], **groups}
    for title, names in grouped.items():
        formatter.start_section(title)
        formatter.add_arguments([action for name in names for action in actions.get(name, [])])
        formatter.end_section()
    if not shows_all:
        formatter.add_text("--help all lists the other fields of transformers.TrainingArguments too.")
    return formatter.format_help()
