"""One benchmark from its sizes to its report."""

import copy
import platform
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from ..bilevel.linear_solve import SolveStatus
from ..data.alternation import Stream
from ..models.memory_format import to_channels_last
from ..models.modeling_bissl import BiSSLModel
from ..trainer.bissl_trainer import BiSSLTrainer
from ..trainer.training_args import BiSSLTrainingArguments
from .claims import Measured, make_claims
from .comparison import SynchronisationWatch, Times, compare_alternations
from .costs import CostModel
from .loops import BareLoop, Baseline, KeptGraphBaseline, PlainLoop
from .measuring import count_work, watched_memory
from .parts import BASELINE_UNIT, PartsOfAlternation, measure_parts
from .workload import Workload, build_model, build_trainer, pretrain

TOLERANCE = 0.01
# The bound on products where a solve stops at a tolerance.
MAX_PRODUCTS = 20
HALF_A_DECADE = 10**0.5
# Beyond it the systems are those of the identity to a thousandth, whatever their curvature.
LARGEST_DAMPING = 1e6


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
        trainer, bare, recycled, baselines = _build_loops(workload, model, device)
        baseline = baselines["baseline"]
        say("Looking for a damping at which the systems are definite")
        raise_damping(recycled)
        say("Measuring the parts of an alternation")
        parts = measure_parts(PartsOfAlternation(bare, baseline), repeats=workload.repeats)
        counts, arithmetic = _count_baseline(baseline, parts.costs(BASELINE_UNIT))
        say(f"Measuring {1 + workload.repeats} alternations of trainer, bare loop, recycled and baselines, in turn")
        alternations = _take_turns(trainer, bare, recycled, baselines)
        for plain in baselines.values():
            plain.close()
    say("Counting waits for the device")
    synchronisations = _count_synchronisations(workload, model, device)
    report: dict[str, Any] = {
        "machine": describe_machine(device),
        "workload": vars(workload),
        "memory_bandwidth": parts.bandwidth,
        "traffic_share": parts.costs().traffic_share,
        "parts": parts.summaries(),
        "alternations": {
            name: {phase: {"median": median(times), "all": times} for phase, times in phases.items()}
            for name, phases in alternations.items()
        },
        "baseline_equivalents": counts,
        "baseline_arithmetic": arithmetic,
        "synchronisations": synchronisations,
        "peak_bytes": memory.peak,
    }
    measured = Measured(
        parts,
        alternations,
        counts,
        arithmetic,
        synchronisations,
        products=[info.iterations for info in bare.solves],
        recycled_products=[info.iterations for info in recycled.solves],
        residuals=[info.residual for info in recycled.solves],
        statuses=[info.status for info in recycled.solves],
        damping=recycled.damping,
    )
    claims = make_claims(measured, device, products=workload.products, upper_steps=workload.upper_steps)
    return {**report, "claims": [vars(claim) for claim in claims]}


def _build_loops(
    workload: Workload, model: BiSSLModel, device: torch.device
) -> tuple[BiSSLTrainer, BareLoop, BareLoop, dict[str, Baseline]]:
    """Returns the trainer, a bare loop, one that recycles, and the baselines, each with a model of its own."""
    trainer = build_trainer(workload, model, device, num_alternations=1 + workload.repeats)
    workers = max(1, workload.workers)
    baselines: dict[str, Baseline] = {
        "baseline": Baseline(trainer, copy.deepcopy(trainer.model), workers=workers),
        "kept graph": KeptGraphBaseline(trainer, copy.deepcopy(trainer.model), workers=workers),
    }
    if workload.bf16:
        baselines["kept graph, bf16"] = KeptGraphBaseline(
            trainer, copy.deepcopy(trainer.model), workers=workers, bf16=True
        )
    if workload.bf16:
        to_channels_last(trainer.model)
    bare = BareLoop(trainer, copy.deepcopy(trainer.model))
    recycled = BareLoop(trainer, copy.deepcopy(trainer.model), _recycling(trainer.args, workload))
    return trainer, bare, recycled, baselines


def _take_turns(
    trainer: BiSSLTrainer, bare: BareLoop, recycled: BareLoop, baselines: dict[str, Baseline]
) -> dict[str, Times]:
    beside: dict[str, PlainLoop] = {"bare loop": bare}
    after: dict[str, PlainLoop] = {"recycled": recycled, **baselines}
    if trainer.args.device.type == "cuda":
        # Side by side the graphs of two curvatures would be held, and workers have longer to read ahead.
        beside, after = {}, {**beside, **after}
    baseline = baselines["baseline"]
    unit = partial(baseline.forward_backward, next(baseline.batches(Stream.LOWER)))
    return compare_alternations(trainer, beside=beside, after=after, units={"baseline": unit})


def raise_damping(loop: BareLoop) -> None:
    """Raises the damping of a loop by half a decade at a time while a solve of two phases meets negative curvature:
    a model that is hardly pre-trained, on few pairs, is indefinite at the paper's. Where it had to, it does so once
    more for the phases to come, on other batches."""
    loop.model.train()
    start = loop.damping
    while loop.damping < LARGEST_DAMPING and _meets_negative_curvature(loop):
        loop.damping *= HALF_A_DECADE
    if loop.damping > start:
        loop.damping *= HALF_A_DECADE


def _meets_negative_curvature(loop: BareLoop) -> bool:
    for alternation in range(2):
        loop.alternations = alternation
        for _ in loop.upper_steps():
            pass
    statuses = {info.status for info in loop.solves}
    loop.solves.clear()
    loop.alternations = 0
    return SolveStatus.NEGATIVE_CURVATURE in statuses


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


def _count_baseline(baseline: Baseline, costs: CostModel) -> tuple[dict[str, float], dict[str, float]]:
    """Forward-backward equivalents of the baseline's phases by the cost model, and by arithmetic alone."""
    (curvature_batch,) = baseline.batches(Stream.CURVATURE)
    lower, upper = next(baseline.batches(Stream.LOWER)), next(baseline.batches(Stream.UPPER))
    steps = {"lower": baseline.args.lower_steps, "upper": baseline.args.upper_steps}
    works = {
        "lower": count_work(lambda: baseline.lower_step(lower)),
        "upper": count_work(lambda: baseline.upper_step(curvature_batch, upper)),
    }
    counted, arithmetic = (
        {phase: steps[phase] * count(work) for phase, work in works.items()}
        for count in (costs.equivalents, costs.arithmetic_alone)
    )
    return counted, arithmetic


def _count_synchronisations(workload: Workload, model: Any, device: torch.device) -> dict[str, int]:
    trainer = build_trainer(workload, model, device, dataloader_num_workers=0)
    watch = SynchronisationWatch(device)
    trainer.add_callback(watch)
    trainer.train()
    return watch.count
