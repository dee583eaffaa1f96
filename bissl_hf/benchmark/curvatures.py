"""What each kind of curvature costs beside one forward and backward pass: time of its linearisation and of a product,
and memory."""

import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from ..bilevel.curvature import Curvature
from ..data.alternation import StepKey, Stream
from ..tensors import Vector
from ..trainer.training_args import CURVATURE_KINDS
from .loops import BareLoop
from .measuring import allocated_by, interleaved_seconds
from .workload import Workload, build_model, build_trainer

UNIT = "forward and backward"


def measure_curvatures(
    workload: Workload, device: torch.device, *, say: Callable[[str], Any] = print
) -> list[dict[str, Any]]:
    """Measures one forward and backward pass of the pretext model on a lower batch, and in turn with it the
    linearisation of each kind of curvature and a product, on the same batch.

    Args:
        workload ([`Workload`]): sizes, precision and rounds.
        device (`torch.device`): a CPU or the first GPU.
        say (`Callable`, *optional*): gets one line before each stage.

    Returns:
        `list[dict]`: for each part its `seconds` in each round, their median over that of the unit (`units`), and the
        bytes that torch allocates at most, beyond model and batch; a product's are those of linearisation and two
        products.
    """
    torch.manual_seed(0)
    trainer = build_trainer(workload, build_model(workload), device, channels_last=workload.bf16)
    trainer.model.train()
    key = StepKey(trainer.args.key_seed, int(Stream.LOWER), 0, 0, 0)
    batch = trainer.streams.read(key)
    loops = {kind: _loop_of(kind, trainer) for kind in CURVATURE_KINDS}
    first = next(iter(loops.values()))
    rhs: Vector = tuple(parameter.detach().clone() for parameter in first.theta_p)
    curvatures: dict[str, Curvature] = {}

    def linearise(kind: str) -> Curvature:
        curvatures[kind] = loops[kind].curvature(batch)
        _ = curvatures[kind].gradient
        return curvatures[kind]

    def linearise_and_multiply(kind: str) -> Vector:
        curvature = linearise(kind)
        curvature(rhs)
        return curvature(rhs)

    parts: dict[str, Callable[[], Any]] = {UNIT: lambda: first.forward_backward(batch)}
    for kind in loops:
        parts[f"{kind}: linearisation"] = lambda kind=kind: linearise(kind)  # type: ignore[misc]
        parts[f"{kind}: product"] = lambda kind=kind: curvatures[kind](rhs)  # type: ignore[misc]
    wholes: dict[str, Callable[[], Any]] = {UNIT: parts[UNIT]}
    wholes |= {f"{kind}: product": lambda kind=kind: linearise_and_multiply(kind) for kind in loops}  # type: ignore[misc]
    for part in parts.values():
        part()  # libraries allocate workspaces at their first use
    say("Measuring the memory of each kind of curvature")
    peaks = {}
    for name, whole in wholes.items():
        curvatures.clear()
        peaks[name] = allocated_by(whole, device).peak
    say(f"Measuring {workload.repeats} rounds of linearisations and products")
    for kind in loops:
        linearise(kind)
    seconds = interleaved_seconds(parts, device, repeats=workload.repeats)
    unit = median(seconds[UNIT])
    return [
        {"part": name, "seconds": times, "units": median(times) / unit, "peak_bytes": peaks.get(name)}
        for name, times in seconds.items()
    ]


def _loop_of(kind: str, trainer: Any) -> BareLoop:
    args = copy.copy(trainer.args)
    args.curvature_kind = kind
    return BareLoop(trainer, trainer.model, args)


def curvature_rows(found: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Returns what was measured as rows of a table."""
    unit = next(part["peak_bytes"] for part in found if part["part"] == UNIT)
    return [
        {
            "part": part["part"],
            "ms": f"{1000 * median(part['seconds']):.1f}",
            "least, most": f"{1000 * min(part['seconds']):.1f}, {1000 * max(part['seconds']):.1f}",
            "units": f"{part['units']:.2f}",
            "peak MiB": "" if part["peak_bytes"] is None else f"{part['peak_bytes'] / 2**20:.0f}",
            "of the unit's": "" if part["peak_bytes"] is None else f"{part['peak_bytes'] / unit:.2f}",
        }
        for part in found
    ]
