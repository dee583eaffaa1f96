"""Values of fields that come without types, from YAML or JSON."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "`field: value` pairs",
    NoneType: "null",
}


def as_field(kind: type, name: str, value: Any, *, origin: str) -> Any:
    """Returns a value as a field takes it: text that is a number as the number.

    Args:
        kind (`type`): the dataclass.
        name (`str`): one of its fields.
        value (`Any`)
        origin (`str`): where the field is set, for messages.

    Raises:
        `ValueError`: if it is of another type.
    """
    hint = get_type_hints(kind)[name]
    hints = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    types = [get_origin(each) or each for each in hints]
    number = _as_number(value, types)
    # For Python true is a whole number, and a whole number no float.
    fits = type(number) in types or (float in types and type(number) is int)
    if not fits:
        allowed = " or ".join(dict.fromkeys(_WORDS[each] for each in types if each in _WORDS))
        raise ValueError(f"{origin} sets {name} to {value!r}; it must be {allowed}.")
    return number


def _as_number(value: Any, types: list[Any]) -> Any:
    """YAML reads 1e-3 as text; text that is no number is for the check of types."""
    if isinstance(value, str) and {int, float} & set(types):
        try:
            value = float(value)
        except ValueError:
            return value
    if isinstance(value, float) and float not in types and int in types and value.is_integer():
        return int(value)
    return value


@contextmanager
def naming(origin: str) -> Iterator[None]:
    """Says in front of an error which settings it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def as_mapping(source: Any, name: str) -> dict[str, Any]:
    """Returns a mapping, which may come as text in JSON.

    Raises:
        `ValueError`: if it is none.
    """
    content = source
    if isinstance(source, str):
        try:
            content = json.loads(source)
        except json.JSONDecodeError:
            content = None
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} is {source!r}; it must hold `field: value` pairs.")
    return dict(content)
