"""Measures how fast an alternation is, part by part, beside a plain baseline in the same process.

    python recipes/benchmark.py [--quick | --growth | --memory] --output FILE.json

Images per second, forward-backward equivalents, memory and waits for the device of every part; then whole alternations
of the trainer, of a bare loop and of the baseline in turn. On a GPU the sizes are the paper's. Other measurements take
its place if asked for.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from ..benchmark.growth import growth_rows, measure_growth
from ..benchmark.memory import measure_memory, memory_rows
from ..benchmark.report import format_report
from ..benchmark.run import describe_machine, run_benchmark
from ..benchmark.workload import WORKLOADS
from ..checkpoints import write_json
from ..text import format_table
from .arguments import parse_arguments, refusing_bad_input
from .outputs import open_output_dir


@dataclass
class BenchmarkArguments:
    """What to measure, and where to write it."""

    output: str = field(metadata={"help": "JSON file for all figures."})
    quick: bool = field(default=False, metadata={"help": "Small sizes: within 3 minutes on 2 idle cores."})
    growth: bool = field(
        default=False,
        metadata={"help": "Measure how alternations grow with batch, image, width and data set instead."},
    )
    memory: bool = field(
        default=False,
        metadata={"help": "Measure the memory of the curvature against its batch, in each mode, instead."},
    )
    use_cpu: bool = field(default=False, metadata={"help": "Measure the CPU although there is a GPU."})
    repeats: int | None = field(
        default=None, metadata={"help": "Rounds that medians are taken of; not with --growth and --memory."}
    )


def main(arguments: list[str] | None = None) -> None:
    (chosen,) = parse_arguments((BenchmarkArguments,), arguments, description=str(__doc__).split("\n\n")[-1])
    device = torch.device("cuda" if torch.cuda.is_available() and not chosen.use_cpu else "cpu")
    workload = WORKLOADS["quick" if chosen.quick else "gpu" if device.type == "cuda" else "cpu"]
    output = Path(chosen.output)
    with refusing_bad_input():
        if output.exists():
            raise ValueError(f"output {output} exists already; choose another file.")
        asked = [name for name in ("quick", "growth", "memory") if getattr(chosen, name)]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)} are measurements of their own; ask for one of them.")
        if chosen.repeats is not None and (chosen.growth or chosen.memory):
            raise ValueError(f"repeats is {chosen.repeats}, and {asked[0]} is measured only once.")
        if chosen.repeats is not None:
            if chosen.repeats < 1:
                raise ValueError(f"repeats is {chosen.repeats}; it must be at least 1.")
            workload = workload.changed(repeats=chosen.repeats)
        open_output_dir(str(output.parent), resume=True)
    logging.set_verbosity_error()
    machine: dict[str, Any] = {"machine": describe_machine(device)}
    if chosen.growth:
        growth = measure_growth(device)
        report, text = {**machine, "growth": growth}, format_table(growth_rows(growth))
    elif chosen.memory:
        memory = measure_memory(device)
        report, text = {**machine, "memory": memory}, f"MiB at most, MiB held\n\n{format_table(memory_rows(memory))}"
    else:
        report = run_benchmark(workload, device)
        text = format_report(report)
    write_json(output, report)
    print(f"\n{text}\n\nAll figures are in {output}.")


if __name__ == "__main__":
    main()
