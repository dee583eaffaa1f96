"""Arguments from YAML and the command line; bad input as one sentence."""

import json
import re
import sys
import time
from argparse import Action
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from safetensors import SafetensorError
from torch.distributed import DistError
from transformers import HfArgumentParser

from ..checkpoints import DamagedFileError
from ..data.paths import expand_path
from ..data.workers import LoaderWorkerError, explaining_lost_workers
from ..text import for_terminal
from ..trainer.divergence import DivergenceError
from .configuration import read_configuration
from .disk import reason_of_disk
from .help import HELP_FLAGS, HelpFormatter, format_grouped_help, group_fields
from .refusal import close_matches, refuse, show, speak
from .values import checked_value

EXIT_DISK = 1
EXIT_DIVERGED = 3
EXIT_LOST_WORKER = 4
_LONGEST_MESSAGE = 500
# How long a process that has lost another waits for that one to speak.
_OTHERS_SPEAK_SECONDS = 5.0
_NEGATIVE = re.compile(r"-\.?[0-9]")


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Turns errors about what the user gave into one sentence. Used around everything that precedes training, and
    nothing else, so that later errors keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        if _is_about_others(error):
            time.sleep(_OTHERS_SPEAK_SECONDS)
        refuse(str(error) or type(error).__name__)


def _is_about_others(error: Exception) -> bool:
    """Whether an exchange failed, as it does when another process has ended: that one knows why."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def stopping_at_divergence() -> Iterator[None]:
    """Ends the process with one sentence where the training diverges (`EXIT_DIVERGED`), where it loses its loader
    workers (`EXIT_LOST_WORKER`), where a disk fails (`EXIT_DISK`), and where a file that it left earlier is damaged
    (`EXIT_BAD_INPUT`)."""
    try:
        with explaining_lost_workers():
            yield
    except LoaderWorkerError as error:
        speak(str(error))
        sys.exit(EXIT_LOST_WORKER)
    except DamagedFileError as error:
        refuse(str(error))
    except DivergenceError as error:
        speak(str(error))
        sys.exit(EXIT_DIVERGED)
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := reason_of_disk(error)) is None:
            raise
        speak(
            f"A disk that the run writes to is full or fails: {reason}. What it saved before is whole: make room or "
            "mend the disk, and go on with --resume_from_checkpoint true."
        )
        sys.exit(EXIT_DISK)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(f"{message if len(message) <= _LONGEST_MESSAGE else f'{message[:_LONGEST_MESSAGE]}...'}; see --help.")

    def _get_value(self, action: Action, arg_string: str) -> Any:
        # Defaults that are text pass here, too.
        text = arg_string if arg_string == action.default else checked_value(action, arg_string)
        return super()._get_value(action, text)


def parse_arguments(
    dataclass_types: Sequence[Any], arguments: Sequence[str] | None = None, *, description: str
) -> tuple[Any, ...]:
    """Reads arguments from `--config FILE.yaml` and the command line, which wins.

    Args:
        dataclass_types (`Sequence`): dataclasses whose fields are the arguments.
        arguments (`Sequence[str]`, *optional*): those of the process if not given.
        description (`str`): what `--help` says first.

    Returns:
        `tuple`: one object per dataclass.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    usage = "%(prog)s [--config FILE.yaml] [--field value ...] [--help [all]]"
    parser = _Parser(
        dataclass_types,
        description=description,
        usage=usage,
        allow_abbrev=False,
        add_help=False,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file with any of these arguments; the command line wins.")
    _show_help(parser, dataclass_types, arguments)
    fields = {action.dest: action for action in parser._actions if action.dest != "config"}
    known = sorted(fields)
    config, rest = _take_config(arguments)
    with refusing_bad_input():
        from_file = _arguments_of_yaml(expand_path(config, field="config"), fields) if config is not None else []
        given = [*from_file, *rest]
        # argparse takes such a value for the end of the options, and makes an empty list of it.
        if lost := next((text for text in given if text.startswith("--") and text.endswith("=--")), None):
            raise ValueError(f"{lost[2:-3]} is '--', which is no value.")
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            given, return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        name = _without_secret(unknown[0])
        refuse(f"Unknown argument {name}{close_matches(name.lstrip('-'), known)}")
    return tuple(parsed)


def given_fields(arguments: Sequence[str] | None = None) -> set[str]:
    """Returns the names of the arguments that the command line or the file of `--config` sets; what
    [`parse_arguments`] has accepted.

    Args:
        arguments (`Sequence[str]`, *optional*): those of the process if not given.
    """
    config, rest = _take_config(sys.argv[1:] if arguments is None else arguments)
    names = {text[2:].partition("=")[0].replace("-", "_") for text in rest if text.startswith("--")}
    if config is None:
        return names
    content = read_configuration(expand_path(config, field="config"))
    return names | {name for name, value in content.items() if value is not None}


def _without_secret(argument: str) -> str:
    """Returns an unknown argument as it may be shown: an option without its value, and no word that looks like a
    token."""
    name, _, _ = argument.partition("=")
    looks_like_token = name.startswith("hf_") or (len(name) >= 20 and any(map(str.isdigit, name)))
    return "(a word like a token)" if looks_like_token else for_terminal(name)


def _show_help(parser: _Parser, dataclass_types: Sequence[Any], arguments: Sequence[str]) -> None:
    """Prints the help and ends the process where the arguments ask for it: `--help`, or `--help all`."""
    asked = [number for number, argument in enumerate(arguments) if argument in HELP_FLAGS]
    if asked:
        shows_all = "all" in arguments[asked[0] + 1 : asked[0] + 2]
        groups = group_fields(dataclass_types, show_all=shows_all)
        show(format_grouped_help(parser, groups, shows_all=shows_all))
        sys.exit(0)


def _take_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits `--config FILE` off."""
    configs: list[str] = []
    rest, remaining = [], iter(arguments)
    for argument in remaining:
        if argument == "--config":
            config = next(remaining, None)
            if config is None:
                refuse("--config needs a YAML file.")
            configs.append(config)
        elif argument.startswith("--config="):
            configs.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    if len(configs) > 1:
        refuse(f"--config names {' and '.join(configs)}; give one file, and what differs on the command line.")
    return next(iter(configs), None), rest


def _arguments_of_yaml(path: str, fields: Mapping[str, Action]) -> list[str]:
    """Returns the content of a YAML file as arguments of a command line."""
    arguments: list[str] = []
    for name, value in read_configuration(path).items():
        if name not in fields:
            raise ValueError(f"Unknown field {name!r} in {path}{close_matches(name, fields)}")
        if value is None:
            continue
        if isinstance(value, list) and fields[name].nargs not in ("+", "*"):
            raise ValueError(
                f"{name} in {path} is the list [{', '.join(map(str, value))}]; it must be a single value."
            )
        if isinstance(value, list):
            items = [item if isinstance(item, str) else json.dumps(item) for item in value]
            if options := [item for item in items if item.startswith("-") and not _NEGATIVE.match(item)]:
                raise ValueError(f"{name} in {path} holds {options[0]!r}; an item must not start with a dash.")
            arguments += [f"--{name}", *items]
        else:
            arguments.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return arguments
