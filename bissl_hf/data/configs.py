"""Configurations of a data set in a folder: what the head of its `README.md` says, as on the Hub."""

from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset

from .pixel_file import refuse_cache

_FENCE = "---"


def read_configs(folder: Path) -> dict[str, bool]:
    """Returns the configurations that a folder's `README.md` describes, and whether each is the default.

    Raises:
        `ValueError`: if the head of the file is no YAML.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    head, separator, rest = readme.read_text(encoding="utf-8-sig", errors="replace").partition("\n")
    block, closing, _ = rest.partition(f"\n{_FENCE}")
    if head.strip() != _FENCE or not separator or not closing:
        return {}
    try:
        content = yaml.safe_load(block)
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).strip().splitlines()
        raise ValueError(f"The head of {str(readme)!r} is not valid YAML: {' '.join(reason[:1])}") from error
    configs = content.get("configs") if isinstance(content, dict) else None
    entries = [entry for entry in configs if isinstance(entry, dict)] if isinstance(configs, list) else []
    return {str(entry.get("config_name", "default")): _is_default(entry) for entry in entries if "data_files" in entry}


def _is_default(entry: dict[str, Any]) -> bool:
    return entry.get("default") is True or entry.get("config_name", "default") == "default"


def load_config(folder: Path, configs: dict[str, bool], name: str | None) -> dict[str, Dataset]:
    """Loads one configuration: the one that is named, the only one, or the default.

    Raises:
        `ValueError`: if there is no such one, several and none is named, or it cannot be loaded.
    """
    chosen = name or next((config for config, default in configs.items() if default or len(configs) == 1), None)
    if chosen not in configs:
        found = f"has no configuration {name!r}" if name else "has several configurations"
        raise ValueError(
            f"The data set in {str(folder)!r} {found}; choose one of {sorted(configs)} with `dataset_config`, or give "
            "its files."
        )
    try:
        return dict(load_dataset(str(folder), chosen))
    # The builders raise errors of their own, which differ between versions.
    except Exception as error:
        refuse_cache(error)
        reason = (str(error.__cause__ or error).strip().splitlines() or ["no reason was given"])[0]
        raise ValueError(
            f"The configuration {chosen!r} of the data set in {str(folder)!r} cannot be loaded: {reason} Correct its "
            "README.md, or give its files."
        ) from error
