"""Measures how fast an alternation is, part by part, beside a plain baseline in the same process.

    python recipes/benchmark.py [--quick] [--stages curvatures alternation growth memory] --output_dir FOLDER

Each stage writes a JSON file of its own as soon as it is done; a later call with the same folder goes on with those
that are missing. `curvatures`: time and memory of a product with each kind of curvature, in units of one forward and
backward pass. `alternation`: every part of an alternation, then whole alternations of the trainer, of a bare loop and
of the baseline in turn. `growth`: against batch, image, width and data set. `memory`: of the curvature in each of its
modes. On a GPU the sizes are the paper's.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils import logging

from ..benchmark.stages import DEFAULT_STAGES, STAGES, check_stages, run_stage, stage_file
from ..benchmark.workload import WORKLOADS, Workload
from .arguments import parse_arguments, refusing_bad_input
from .outputs import open_output_dir


@dataclass
class BenchmarkArguments:
    """What to measure, and where to write it."""

    output_dir: str = field(metadata={"help": "Folder for a JSON file per stage; those that are there are kept."})
    stages: list[str] = field(
        default_factory=lambda: list(DEFAULT_STAGES), metadata={"help": f"Some of {', '.join(STAGES)}, in order."}
    )
    quick: bool = field(default=False, metadata={"help": "Small sizes: within 3 minutes on 2 idle cores."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the views; not with stage growth."})
    use_cpu: bool = field(default=False, metadata={"help": "Measure the CPU although there is a GPU."})
    repeats: int | None = field(
        default=None, metadata={"help": "Rounds that medians are taken of; for stages curvatures and alternation."}
    )


def main(arguments: list[str] | None = None) -> None:
    (chosen,) = parse_arguments((BenchmarkArguments,), arguments, description=str(__doc__).split("\n\n")[-1])
    device = torch.device("cuda" if torch.cuda.is_available() and not chosen.use_cpu else "cpu")
    folder = Path(chosen.output_dir)
    with refusing_bad_input():
        workload = choose_workload(chosen, device)
        check_stages(folder, chosen.stages, workload, device)
        open_output_dir(str(folder), resume=True)
    logging.set_verbosity_error()
    for name in chosen.stages:
        known = " (measured before)" if stage_file(folder, name).exists() else ""
        print(f"\n{name}{known}\n")
        report = run_stage(folder, name, workload, device)
        print(f"{STAGES[name].show(report)}\n\nAll figures are in {stage_file(folder, name)}.", flush=True)


def choose_workload(chosen: BenchmarkArguments, device: torch.device) -> Workload:
    """Returns the sizes to measure.

    Raises:
        `ValueError`: for sizes out of range, or that no stage takes.
    """
    workload = WORKLOADS["quick" if chosen.quick else "gpu" if device.type == "cuda" else "cpu"]
    for name in ("repeats", "image_size"):
        value = getattr(chosen, name)
        if value is None:
            continue
        least = 1 if name == "repeats" else 16
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
        without = [stage for stage in chosen.stages if stage in STAGES and not STAGES[stage].has_rounds]
        if name == "image_size":
            without = [stage for stage in without if stage == "growth"]
        if without and (name == "image_size" or len(without) == len(chosen.stages)):
            raise ValueError(f"{name} is {value}, and stage {without[0]} does not take it; leave one of them out.")
        workload = workload.changed(**{name: value})
    return workload


if __name__ == "__main__":
    main()
