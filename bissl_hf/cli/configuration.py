"""Configurations in YAML, read as text: a value reaches its field as it is written in the file.

YAML 1.1 turns `010` into 8, `1:30` into 90, `2026_01_15` into 20260115 and `no` into false. A field knows its type
better, so that only the structure is taken from YAML, and null.
"""

import re
from pathlib import Path
from typing import Any

import yaml

Text = str | list[Any] | dict[str, Any] | None

_MAX_NODES = 10_000
_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"
_NULL = f"{_TAG}null"
# fmt: off
_KNOWN = frozenset(
    _TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "merge", "value", "map", "seq")
)
# fmt: on
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]{1,4})?")


def read_configuration(path: str) -> dict[str, Text]:
    """Returns the fields of a YAML file: text, `None` for null, lists, and mappings (whose values have types).

    Raises:
        `ValueError`: if it cannot be read, is no YAML, or no mapping with each field once.
    """
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except OSError as error:
        raise ValueError(f"The configuration {path} cannot be read: {error.strerror or error}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {path} is not valid YAML: {error}") from error
    except RecursionError as error:
        raise ValueError(f"The configuration {path} is not valid YAML: it is nested too deeply.") from error
    if root is None:
        raise ValueError(f"The configuration {path} is empty; it must hold `field: value` lines.")
    if not isinstance(root, yaml.MappingNode):
        kind = "list" if isinstance(root, yaml.SequenceNode) else "text"
        raise ValueError(f"The configuration {path} must hold `field: value` lines; it holds {kind}.")
    reader = _Reader()
    try:
        return {name: reader.text(value) for name, value in reader.fields(root)}
    except ValueError as error:
        raise ValueError(f"The configuration {path} is not valid YAML: {error}") from error


class _Reader:
    """Turns the nodes of a YAML file into values. An alias is the node that it stands for, so that few lines may mean
    a million values, or one that holds itself."""

    def __init__(self) -> None:
        self._nodes = 0

    def text(self, node: yaml.Node) -> Text:
        """Returns a value of a field: text as it is written."""
        if isinstance(node, yaml.ScalarNode):
            return None if self._scalar(node) is None else str(node.value)
        if isinstance(node, yaml.SequenceNode):
            _check_tag(node)
            return [self._item(item) for item in node.value]
        return dict(self._typed(node))

    def fields(self, node: yaml.MappingNode) -> list[tuple[str, yaml.Node]]:
        """Returns the fields of a mapping."""
        names = []
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"a field must have a name; there is a {key.id}{_place(key)}.")
            if key.value in names:
                count = sum(other.value == key.value for other, _ in node.value)
                raise ValueError(f"the field {key.value!r} stands there {count} times{_place(node)}.")
            names.append(str(key.value))
        return [(name, value) for name, (_, value) in zip(names, node.value, strict=True)]

    def _item(self, node: yaml.Node) -> Any:
        return str(node.value) if isinstance(node, yaml.ScalarNode) else self._typed(node)

    def _typed(self, node: yaml.Node, depth: int = 0) -> Any:
        """Returns a value inside a mapping, which has no field that knows its type: by the core schema of YAML 1.2."""
        self._nodes += 1
        if self._nodes > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError(
                f"it holds more than {_MAX_NODES:,} values, or more than {_MAX_DEPTH} inside one "
                f"another{_place(node)}."
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        _check_tag(node)
        if isinstance(node, yaml.MappingNode):
            return {name: self._typed(value, depth + 1) for name, value in self.fields(node)}
        return [self._typed(item, depth + 1) for item in node.value]

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        _check_tag(node)
        text = str(node.value)
        if node.style is not None:
            return text
        if node.tag == _NULL:
            return None
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        if node.tag == f"{_TAG}int" and _INTEGER.fullmatch(text):
            return int(text)
        is_float = _FLOAT.fullmatch(text) and not _INTEGER.fullmatch(text)
        return float(text) if is_float else text


def _check_tag(node: yaml.Node) -> None:
    if node.tag not in _KNOWN:
        raise ValueError(f"the tag {node.tag!r} is not supported{_place(node)}.")


def _place(node: yaml.Node) -> str:
    return f" (line {node.start_mark.line + 1})"
