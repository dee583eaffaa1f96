"""Arms of BiSSL that differ in one setting, put in the order of its values."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ..evaluation.figures import Panel
from ..trainer.training_args import BiSSLTrainingArguments

PULL = "pull (measured)"
SHOWN = {"score": "fine-tuned", "features/probe": "linear probe", "features/knn": "nearest neighbours"}


def sensitivity_panels(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Returns a panel for each setting of BiSSL whose value several arms differ in: the differences to the baseline
    over its values, with their range over seeds; for the weight of the proximal term also over the pull that was
    measured.

    Arms that override the same settings belong together, in the panels of those in which they differ. The first BiSSL
    arm without overrides belongs to all.

    Args:
        settings (`Mapping`): of results.json.
        rows (`Sequence[Mapping]`): of one set and number of labels, see [`compare`].
    """
    arms = {arm["name"]: arm["overrides"] for arm in settings["arms"] if arm["kind"] == "bissl"}
    by_arm = {row["arm"]: row for row in rows if row["arm"] in arms}
    base = next((row for name, row in by_arm.items() if not arms[name]), None)
    families: dict[tuple[str, ...], list[str]] = {}
    for name in by_arm:
        families.setdefault(tuple(sorted(arms[name])), []).append(name)
    panels: list[Panel] = []
    for overridden, family in families.items():
        for setting in overridden:
            found = {arms[name][setting]: by_arm[name] for name in family}
            if len(overridden) > 1 and len(found) < max(2, len(family)):
                continue  # arms with the same value differ in another setting
            if base is not None:
                found.setdefault(_base_value(settings, setting), base)
            panels += _panels(setting, found)
    return panels


def _panels(setting: str, found: Mapping[Any, Mapping[str, Any]]) -> list[Panel]:
    """The panel of a setting, if its values are numbers."""
    if len(found) < 2 or not all(isinstance(value, int | float) for value in found):
        return []
    rows = [found[value] for value in sorted(found)]
    panels: list[Panel] = [(setting, [f"{value:g}" for value in sorted(found)], _series(rows))]
    if setting == "proximal_weight":
        panels.append((PULL, [f"{row['measures']['pull']['mean']:.2g}" for row in rows], _series(rows)))
    return panels


def _base_value(settings: Mapping[str, Any], name: str) -> Any:
    """What the study, or else the trainer, sets; the lower batch is that of the curvature by default."""
    defaults = {field.name: field.default for field in fields(BiSSLTrainingArguments)}
    value = settings["bissl"].get(name, defaults[name])
    if name == "curvature_batch_size" and value is None:
        return _base_value(settings, "per_device_lower_batch_size")
    return value


def _series(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[float, float, float]]]]:
    return [
        (label, [points(row["measures"][name]["comparison"], "range") for row in rows])
        for name, label in SHOWN.items()
        if all(name in row["measures"] for row in rows)
    ]


def points(comparison: Mapping[str, Any], bounds: str = "interval") -> tuple[float, float, float]:
    """Returns a difference and its `"interval"`, or its `"range"` over seeds, in percentage points; NaN where there is
    none."""
    low, high = comparison[bounds] or (float("nan"), float("nan"))
    return 100 * comparison["difference"], 100 * low, 100 * high
