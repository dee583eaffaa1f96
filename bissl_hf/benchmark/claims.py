"""What is claimed of a benchmark: ratios of times taken in one run, with the bounds that they must keep."""

from dataclasses import dataclass
from statistics import median

import torch

from ..bilevel.linear_solve import SolveStatus
from .comparison import TRAINER, steps_of
from .loops import PHASES
from .measuring import median_ratio
from .parts import UNIT, MeasuredParts

_PAPER_UPPER_STEPS = 8


@dataclass(frozen=True)
class Claim:
    """One figure with its bounds.

    Args:
        name (`str`)
        value (`float`)
        at_least, at_most (`float`, *optional*): the bounds.
    """

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the value keeps to its bounds."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    @property
    def bounds(self) -> str:
        """The bounds as text."""
        texts = ((">=", self.at_least), ("<=", self.at_most))
        return ", ".join(f"{sign} {bound:g}" for sign, bound in texts if bound is not None)


@dataclass
class Measured:
    """What the claims are made of.

    Args:
        parts ([`MeasuredParts`])
        alternations (`dict`): seconds by runner and phase.
        baseline_equivalents (`dict[str, float]`): forward-backward equivalents of the baseline's phases by the cost
            model.
        baseline_arithmetic (`dict[str, float]`): the same by floating-point operations alone.
        synchronisations (`dict[str, int]`): waits for the device in each phase of the trainer.
        products (`list[int]`): of each solve of the bare loop, where as many are asked for as the baseline takes.
        recycled_products (`list[int]`), residuals (`list[float]`), statuses (`list[SolveStatus]`): of each solve that
            recycles.
        damping (`float`): of those solves.
    """

    parts: MeasuredParts
    alternations: dict[str, dict[str, list[float]]]
    baseline_equivalents: dict[str, float]
    baseline_arithmetic: dict[str, float]
    synchronisations: dict[str, int]
    products: list[int]
    recycled_products: list[int]
    residuals: list[float]
    statuses: list[SolveStatus]
    damping: float

    def seconds(self, part: str) -> float:
        """Median seconds of a part."""
        return median(self.parts[part].seconds)

    def whole(self, name: str) -> list[float]:
        """Seconds of both phases of a runner together."""
        phases = [self.alternations[name][phase] for phase in PHASES]
        return [sum(times) for times in zip(*phases, strict=True)]

    def loop_cost(self) -> float:
        """Time of the trainer over that of the bare loop: the median of the ratios of single steps, which are taken in
        turn, in each phase, weighted by the time of the phase."""
        ours, bare = self.alternations[TRAINER], self.alternations["bare loop"]
        weights = {phase: median(bare[phase]) for phase in PHASES}
        costs = {phase: median_ratio(ours[steps_of(phase)], bare[steps_of(phase)]) for phase in PHASES}
        return sum(weights[phase] * costs[phase] for phase in PHASES) / sum(weights.values())

    def baseline_against(self, equivalents: dict[str, float]) -> float:
        """Time of the baseline, without waiting for its workers, over a number of its units."""
        times = self.alternations["baseline"]
        computing = [whole - waited for whole, waited in zip(self.whole("baseline"), times["waiting"], strict=True)]
        return median_ratio(computing, [sum(equivalents.values()) * unit for unit in times["unit"]])


def make_claims(measured: Measured, device: torch.device, *, products: int, upper_steps: int) -> list[Claim]:
    """Returns what this run says about each target; those for a GPU only where there is one, and that for recycling
    only where a phase has as many steps to recycle for as the paper's."""
    times, on_gpu = measured.alternations, device.type == "cuda"
    ours, baseline = measured.whole(TRAINER), measured.whole("baseline")
    same_products = median_ratio(times["baseline"]["upper"], times[TRAINER]["upper"])
    waiting = median_ratio(times[TRAINER]["waiting"], ours)
    claims = [
        Claim(
            "baseline: its time over its own count of equivalents",
            measured.baseline_against(measured.baseline_equivalents),
            0.85,
            1.15,
        ),
        Claim("the same by arithmetic alone", measured.baseline_against(measured.baseline_arithmetic)),
        Claim("upper phase, same products: baseline / trainer", same_products, at_least=1.3),
        *(
            Claim(
                f"the same against the baseline with a {name}",
                median_ratio(times[name]["upper"], times[TRAINER]["upper"]),
            )
            for name in times
            if name.startswith("kept graph")
        ),
        Claim("products of each solve, for that comparison", min(measured.products), at_least=products),
        Claim("whole alternation: baseline / trainer", median_ratio(baseline, ours), at_least=8.0 if on_gpu else 1.0),
        Claim("whole alternation: trainer / bare loop", measured.loop_cost(), at_most=1.03),
        Claim("share of an alternation spent waiting for batches", waiting, at_most=0.01),
    ]
    residual = median(measured.residuals)
    broken_down = sum(status == SolveStatus.NEGATIVE_CURVATURE for status in measured.statuses)
    # Solves that end early, of negative curvature, are fast for nothing: they count as none.
    speed = median_ratio(times["baseline"]["upper"], times["recycled"]["upper"]) if residual <= 0.01 else 0.0
    aim = 2.2 if upper_steps >= _PAPER_UPPER_STEPS else None
    claims += [
        Claim("upper phase, recycled solver at 1 %: baseline / ours", speed, at_least=aim),
        Claim("median residual of its solves", residual, at_most=0.01),
        Claim("share of its solves that met negative curvature", broken_down / len(measured.statuses), at_most=0),
        Claim("mean products of its solves", sum(measured.recycled_products) / len(measured.recycled_products)),
        Claim("damping of its solves", measured.damping),
    ]
    if on_gpu:
        speed = measured.seconds(UNIT) / measured.seconds("lower step")
        claims += [
            Claim("lower step: images per second over those of a bare step", speed, at_least=0.6),
            *(
                Claim(f"waits for the device in the {phase} phase", count, at_most=0)
                for phase, count in measured.synchronisations.items()
            ),
        ]
    return claims
