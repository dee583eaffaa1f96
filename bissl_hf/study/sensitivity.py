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
    over its values, with their range over seeds; and for the weight of the proximal term also over the pull that was measured.

    An arm belongs to the first setting among its overrides. The first BiSSL arm, if it has none, belongs to all.

    Args:
        settings (`Mapping`): of results.json.
        rows (`Sequence[Mapping]`): of one set and number of labels, see [`compare`].
    """
    arms = {arm["name"]: arm["overrides"] for arm in settings["arms"] if arm["kind"] == "bissl"}
    by_arm = {row["arm"]: row for row in rows if row["arm"] in arms}
    base = next((name for name in by_arm if not arms[name]), None)
    varied: dict[str, dict[float, Mapping[str, Any]]] = {}
    for name, row in by_arm.items():
        setting, value = next(iter(arms[name].items()), (None, None))
        if setting is not None and isinstance(value, int | float):
            varied.setdefault(setting, {})[value] = row
    panels: list[Panel] = []
    for setting, found in varied.items():
        value = _base_value(settings, setting)
        if base is not None and isinstance(value, int | float):
            found.setdefault(value, by_arm[base])
        ordered = dict(sorted(found.items()))
        if len(ordered) > 1:
            panels.append((setting, [f"{value:g}" for value in ordered], _series(list(ordered.values()))))
            if setting == "proximal_weight":
                pulls = [f"{row['measures']['pull']['mean']:.2g}" for row in ordered.values()]
                panels.append((PULL, pulls, _series(list(ordered.values()))))
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
