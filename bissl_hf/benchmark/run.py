"""One benchmark from its sizes to its report."""

import copy
import platform
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from ..data.alternation import Stream
from ..linear_solve import SolveStatus
from ..trainer.training_args import BiSSLTrainingArguments
from .claims import Measured, make_claims
from .comparison import TRAINER, SynchronisationWatch, compare_alternations
from .loops import BareLoop, Baseline, PlainLoop
from .measuring import count_flops, watched_memory
from .parts import Part, PartsOfAlternation, measure_parts
from .workload import Workload, build_model, build_trainer, pretrain

TOLERANCE = 0.01
# The bound on products where a solve stops at a tolerance.
MAX_PRODUCTS = 20
HALF_A_DECADE = 10**0.5


def run_benchmark(workload: Workload, device: torch.device, *, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Measures a workload.

    Args:
        workload ([`Workload`]): sizes.
        device (`torch.device`): a CPU or the first GPU.
        say (`Callable`, *optional*): gets one line before each stage.

    Returns:
        `dict`: machine, workload, parts, alternations and claims, as JSON.
    """
    torch.manual_seed(0)
    model = build_model(workload)
    say(f"Pre-training the lower model with SimCLR for {workload.pretrain_steps} steps")
    pretrain(model, workload, device)
    with watched_memory(device) as memory:
        trainer = build_trainer(workload, model, device, num_alternations=1 + workload.repeats)
        baseline = Baseline(trainer, copy.deepcopy(trainer.model), workers=max(1, workload.workers))
        if workload.bf16:
            _to_channels_last(trainer.model)
        bare = BareLoop(trainer, copy.deepcopy(trainer.model))
        recycled = BareLoop(trainer, copy.deepcopy(trainer.model), _recycling(trainer.args, workload))
        say("Looking for a damping at which the systems are definite")
        raise_damping(recycled)
        loops: dict[str, PlainLoop] = {"bare loop": bare, "recycled": recycled, "baseline": baseline}
        say("Measuring the parts of an alternation")
        of_alternation = PartsOfAlternation(bare, baseline)
        parts = measure_parts(of_alternation, repeats=workload.repeats)
        counts = _count_baseline(baseline, parts[0])
        say(f"Measuring {1 + workload.repeats} alternations of {', '.join([TRAINER, *loops])}, in turn")
        alternations = compare_alternations(trainer, loops, unit=of_alternation.forward_backward)
        baseline.close()
    say("Counting waits for the device")
    synchronisations = _count_synchronisations(workload, model, device)
    report: dict[str, Any] = {
        "machine": describe_machine(device),
        "workload": vars(workload),
        "parts": [part.summary(parts[0]) for part in parts],
        "alternations": {
            name: {phase: {"median": median(times), "all": times} for phase, times in phases.items()}
            for name, phases in alternations.items()
        },
        "baseline_equivalents": counts,
        "synchronisations": synchronisations,
        "peak_bytes": memory.peak,
    }
    measured = Measured(
        parts,
        alternations,
        counts,
        synchronisations,
        products=[info.iterations for info in bare.solves],
        recycled_products=[info.iterations for info in recycled.solves],
        residuals=[info.residual for info in recycled.solves],
        statuses=[info.status for info in recycled.solves],
        damping=recycled.args.damping,
    )
    claims = make_claims(measured, device, products=workload.products, upper_steps=workload.upper_steps)
    return {**report, "claims": [vars(claim) for claim in claims]}


def raise_damping(loop: BareLoop) -> None:
    """Raises the damping of a loop by half a decade at a time while a solve of two phases meets negative curvature:
    a model that is hardly pre-trained, on few pairs, is indefinite at the paper's. Where it had to, it does so once
    more for the phases to come, on other batches."""
    loop.model.train()
    start = loop.args.damping
    while _meets_negative_curvature(loop):
        loop.args.damping *= HALF_A_DECADE
    if loop.args.damping > start:
        loop.args.damping *= HALF_A_DECADE


def _meets_negative_curvature(loop: BareLoop) -> bool:
    for alternation in range(2):
        loop.alternations = alternation
        loop.upper_phase()
    statuses = {info.status for info in loop.solves}
    loop.solves.clear()
    loop.alternations = 0
    return SolveStatus.NEGATIVE_CURVATURE in statuses


def _to_channels_last(model: Any) -> None:
    model.to(memory_format=torch.channels_last)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Tells what was measured on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _recycling(args: BiSSLTrainingArguments, workload: Workload) -> BiSSLTrainingArguments:
    args = copy.copy(args)
    args.solver, args.solver_tolerance, args.solver_max_iterations = "recycled", TOLERANCE, MAX_PRODUCTS
    args.damping = workload.damping
    return args


def _count_baseline(baseline: Baseline, unit: Part) -> dict[str, float]:
    """Forward-backward equivalents of the baseline's phases, by its floating-point operations."""
    (curvature_batch,) = baseline.batches(Stream.CURVATURE)
    steps = baseline.trainer.sources
    lower, upper = next(baseline.batches(Stream.LOWER)), next(baseline.batches(Stream.UPPER))
    flops = {
        "lower": count_flops(lambda: baseline.lower_step(lower)) * steps[Stream.LOWER].steps_per_alternation,
        "upper": count_flops(lambda: baseline.upper_step(curvature_batch, upper))
        * steps[Stream.UPPER].steps_per_alternation,
    }
    return {phase: count / unit.flops for phase, count in flops.items()}


def _count_synchronisations(workload: Workload, model: Any, device: torch.device) -> dict[str, int]:
    trainer = build_trainer(workload, model, device, dataloader_num_workers=0)
    watch = SynchronisationWatch(device)
    trainer.add_callback(watch)
    trainer.train()
    return watch.count
