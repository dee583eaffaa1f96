"""The stages of a benchmark, each with a file of its own."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import write_json
from ..text import format_table
from .curvatures import curvature_rows, measure_curvatures
from .growth import growth_rows, measure_growth
from .memory import measure_memory, memory_rows
from .report import format_report
from .run import describe_machine, run_benchmark
from .workload import Workload


@dataclass(frozen=True)
class Stage:
    """One measurement.

    Args:
        measure (`Callable`): from sizes and device to figures.
        show (`Callable`): from its report to text.
        has_rounds (`bool`): whether it takes the rounds, the batches and the width of the workload.
    """

    measure: Callable[[Workload, torch.device], Any]
    show: Callable[[dict[str, Any]], str]
    has_rounds: bool = True


STAGES: dict[str, Stage] = {
    "curvatures": Stage(
        lambda workload, device: {"curvatures": measure_curvatures(workload, device)},
        lambda report: format_table(curvature_rows(report["curvatures"])),
    ),
    "alternation": Stage(lambda workload, device: run_benchmark(workload, device), format_report),
    "growth": Stage(
        lambda workload, device: {"growth": measure_growth(device)},
        lambda report: format_table(growth_rows(report["growth"])),
        has_rounds=False,
    ),
    "memory": Stage(
        lambda workload, device: {"memory": measure_memory(device, workload=workload)},
        lambda report: f"MiB at most, MiB held\n\n{format_table(memory_rows(report['memory']))}",
        has_rounds=False,
    ),
}
DEFAULT_STAGES = ("curvatures", "alternation")


def stage_file(folder: Path, name: str) -> Path:
    """Returns the file of a stage."""
    return folder / f"{name}.json"


def check_stages(folder: Path, names: list[str], workload: Workload, device: torch.device) -> None:
    """Refuses stages that there are not, and a folder whose stages were measured with other sizes or elsewhere.

    Raises:
        `ValueError`: with what was given, what is allowed and what to change; also for a damaged file.
    """
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        raise ValueError(f"stages is {' '.join(names) or 'empty'}; it must be some of {', '.join(STAGES)}.")
    for name in names:
        path = stage_file(folder, name)
        if not path.exists():
            continue
        report = _read(path)
        measured = {**report["workload"], "device": report["machine"]["device"]}
        asked = {**vars(workload), "device": describe_machine(device)["device"]}
        changed = [
            f"{key} was {measured.get(key)} and is {value}"
            for key, value in asked.items()
            if measured.get(key) != value
        ]
        if changed:
            raise ValueError(
                f"output_dir {folder} holds {path.name} of another benchmark: {'; '.join(changed)}. Choose another "
                "folder, or the same settings to go on."
            )


def run_stage(folder: Path, name: str, workload: Workload, device: torch.device) -> dict[str, Any]:
    """Returns the report of a stage: what its file holds, or else what is measured now and written there at once."""
    path = stage_file(folder, name)
    if path.exists():
        return _read(path)
    figures = STAGES[name].measure(workload, device)
    report = {"machine": describe_machine(device), "workload": vars(workload), **figures}
    write_json(path, report)
    return report


def _read(path: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not {"machine", "workload"} <= set(report):
            raise ValueError("it has no machine or no workload")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no report of a stage: {error}. Remove it to measure the stage again.") from error
    return report
