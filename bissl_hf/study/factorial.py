"""Arms of BiSSL that combine settings: a panel per measure and value of one, a series per choice of another."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.figures import Panel
from .sensitivity import SHOWN, points

_MEASURES = ("score", "features/knn")
Rows = Sequence[Mapping[str, Any]]


def factorial_panels(settings: Mapping[str, Any], rows: Rows) -> tuple[str, list[Panel]] | None:
    """Returns the panels of arms of BiSSL that try all combinations of some settings: of the numbers that they
    override the one with most values is the axis, the others make the panels, and words (such as the solver) the
    series.

    Args:
        settings (`Mapping`): of results.json.
        rows (`Sequence[Mapping]`): of one set and number of labels, see [`compare`].

    Returns:
        `tuple`: the name of the axis, and the panels; `None` where a combination is missing, or only one setting
            varies.
    """
    overrides = {arm["name"]: arm["overrides"] for arm in settings["arms"] if arm["kind"] == "bissl"}
    arms = [row for row in rows if overrides.get(row["arm"])]
    values = _values_of_numbers([overrides[row["arm"]] for row in arms])
    if not values:
        return None
    axis, *others = sorted(values, key=lambda name: -len(values[name]))
    cells: dict[str, dict[str, dict[Any, Mapping[str, Any]]]] = {}
    for row in arms:
        own = overrides[row["arm"]]
        title = ", ".join(f"{name} {own[name]:g}" for name in others if name in own)
        words = " ".join(value for value in own.values() if isinstance(value, str))
        cells.setdefault(title, {}).setdefault(words, {})[own.get(axis)] = row
    series = [found for panel in cells.values() for found in panel.values()]
    if len(series) < 2 or any(sorted(found, key=str) != sorted(values[axis], key=str) for found in series):
        return None
    measures = [name for name in _MEASURES if all(name in row["measures"] for row in arms)]
    panels = [_panel(title, name, panel, values[axis]) for name in measures for title, panel in cells.items()]
    return axis, panels


def _panel(
    title: str, measure: str, panel: Mapping[str, Mapping[Any, Mapping[str, Any]]], values: Sequence[float]
) -> Panel:
    series = [
        (words, [points(found[value]["measures"][measure]["comparison"]) for value in values])
        for words, found in panel.items()
    ]
    return f"{title}, {SHOWN[measure]}".removeprefix(", "), [f"{value:g}" for value in values], series


def _values_of_numbers(overrides: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The numbers that arms override with more than one value, each with its values in their order."""
    found: dict[str, set[float]] = {}
    for own in overrides:
        for name, value in own.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, set()).add(value)
    return {name: sorted(values) for name, values in found.items() if len(values) > 1}
