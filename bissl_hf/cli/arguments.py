"""Arguments from YAML and the command line; bad input as one sentence."""

import difflib
import json
import os
import sys
from argparse import Action
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from safetensors import SafetensorError
from transformers import HfArgumentParser

from .help import HELP_FLAGS, HelpFormatter, format_grouped_help, group_fields

EXIT_BAD_INPUT = 2
_BOOL = "tag:yaml.org,2002:bool"


def refuse(message: str) -> NoReturn:
    """Ends the process with one sentence on stderr and the exit code for bad input."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Turns errors about what the user gave into one sentence. Used around everything that precedes training, and
    nothing else, so that later errors keep their traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        refuse(str(error) or type(error).__name__)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(f"{message}; see --help.")


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
    from_file = _arguments_of_yaml(config, fields) if config is not None else []
    with refusing_bad_input():
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            [*from_file, *rest], return_remaining_strings=True, look_for_args_file=False
        )
    if unknown:
        refuse(f"Unknown argument {unknown[0]}{close_matches(unknown[0].lstrip('-').split('=')[0], known)}")
    return tuple(parsed)


def _show_help(parser: _Parser, dataclass_types: Sequence[Any], arguments: Sequence[str]) -> None:
    """Prints the help and ends the process where the arguments ask for it: `--help`, or `--help all`."""
    asked = [number for number, argument in enumerate(arguments) if argument in HELP_FLAGS]
    if asked:
        shows_all = "all" in arguments[asked[0] + 1 : asked[0] + 2]
        groups = group_fields(dataclass_types, show_all=shows_all)
        print(format_grouped_help(parser, groups, shows_all=shows_all))
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


class _Loader(yaml.SafeLoader):
    """Leaves no, off, yes and on as they are (a field of true or false takes them too), and refuses a field that
    stands in a mapping twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the field {repeated[0]!r} stands there {names.count(repeated[0])} times", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL or first in "tTfF"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _arguments_of_yaml(path: str, fields: Mapping[str, Action]) -> list[str]:
    """Returns the content of a YAML file as arguments of a command line."""
    try:
        content = yaml.load(Path(path).read_text(), _Loader)
    except OSError as error:
        refuse(f"The configuration {path} cannot be read: {error.strerror or error}.")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        refuse(f"The configuration {path} is not valid YAML: {error}")
    if content is None:
        refuse(f"The configuration {path} is empty; it must hold `field: value` lines.")
    if not isinstance(content, dict):
        refuse(f"The configuration {path} must hold `field: value` lines; it holds {type(content).__name__}.")
    arguments: list[str] = []
    for name, value in content.items():
        if name not in fields:
            refuse(f"Unknown field {name!r} in {path}{close_matches(str(name), fields)}")
        if value is None:
            continue
        if isinstance(value, list) and fields[name].nargs not in ("+", "*"):
            refuse(f"{name} in {path} is the list {value}; it must be a single value.")
        if isinstance(value, list):
            arguments += [f"--{name}", *(json.dumps(item) if isinstance(item, dict) else str(item) for item in value)]
        elif isinstance(value, dict):
            arguments.append(f"--{name}={json.dumps(value)}")
        else:
            arguments.append(f"--{name}={value}")
    return arguments


def close_matches(name: str, known: Iterable[str], otherwise: str = "; see --help for those that exist.") -> str:
    """Returns how to end a sentence on an unknown name: with known ones like it, or `otherwise` if there are none."""
    matches = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(matches)}?" if matches else otherwise
