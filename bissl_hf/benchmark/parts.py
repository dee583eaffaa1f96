"""The parts of an alternation one by one: seconds, images per second, and forward-backward equivalents.

The unit is one forward and backward pass of the pretext model on a lower batch whose views are ready. What a part
costs is its time over the unit's; for what it should cost see `costs.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ..bilevel.curvature import Curvature
from ..data.alternation import StepKey, Stream
from ..tensors import add_scaled
from .costs import CostModel, memory_bandwidth
from .loops import BareLoop, Baseline
from .measuring import SynchronisationCounter, Work, count_work, interleaved_seconds, spread, watched_memory

NO_WORK = Work(0, 0)
UNIT = "forward and backward"
BASELINE_UNIT = "baseline's forward and backward"
# Parts that are not, or only for a little, made of operators on tensors.
_WITHOUT_COUNT = ("reading", "views by Pillow, one process")


@dataclass
class Part:
    """One part, measured.

    Args:
        name (`str`)
        images (`int`): how many one call works on; 0 where it works on weights.
        seconds (`list[float]`): of each round.
        work (`Work`): of a call; nothing where it is not made of operators on tensors.
        synchronisations (`int`): how often a call waits for the device.
        peak_bytes (`int`): largest memory in use during a call, beyond what was in use before it.
    """

    name: str
    images: int
    seconds: list[float] = field(default_factory=list)
    work: Work = NO_WORK
    synchronisations: int = 0
    peak_bytes: int = 0

    def summary(self, unit: "Part", costs: CostModel) -> dict[str, Any]:
        """Returns what the table shows, with equivalents of `unit`."""
        spent, work = median(self.seconds), self.work
        return {
            "part": self.name,
            "seconds": spent,
            "images_per_second": self.images / spent if self.images else None,
            "equivalents": spent / median(unit.seconds),
            "expected_equivalents": costs.equivalents(work) if work != NO_WORK else None,
            "arithmetic_alone": costs.arithmetic_alone(work) if work != NO_WORK else None,
            "synchronisations": self.synchronisations,
            "peak_bytes": self.peak_bytes,
            "bytes_moved": work.traffic,
            "least_bytes": work.least_traffic,
            "spread": spread(self.seconds),
            "repeats": len(self.seconds),
        }


class PartsOfAlternation:
    """The parts of an alternation as functions without arguments, each of which can be called again and again.

    Args:
        loop ([`BareLoop`]): whose parts.
        baseline ([`Baseline`]): whose product is measured beside.
    """

    def __init__(self, loop: BareLoop, baseline: Baseline) -> None:
        self.loop, self.baseline = loop, baseline
        self.loop.model.train()
        self.sources = loop.trainer.streams.sources
        self.keys = {stream: StepKey(loop.args.key_seed, int(stream), 0, 0, 0) for stream in Stream}
        self.raw = {stream: self.sources[stream].read(self.keys[stream]) for stream in (Stream.LOWER, Stream.UPPER)}
        self.batches = {stream: loop.views(inputs, self.keys[stream]) for stream, inputs in self.raw.items()}
        self.baseline_batch = next(baseline.batches(Stream.CURVATURE))
        _, self.lower_gradient = loop.forward_backward(self.batches[Stream.LOWER])
        self.upper_gradient = self.upper_gradients()
        self.rhs = self.upper_gradient[: len(loop.theta_p)]
        self.curvature: Curvature = self.linearise()

    def upper_gradients(self) -> Any:
        """Gradients of the downstream loss at theta_P and at theta_D."""
        loop, batch = self.loop, self.batches[Stream.UPPER]
        _, aligned = loop.gradient(loop.model.without_side_effects("aligned"), batch, (*loop.theta_p, *loop.phi_d))
        _, direct = loop.gradient(loop.model.upper, batch, loop.upper_parameters)
        return add_scaled(aligned, direct, loop.args.direct_weight)

    def linearise(self) -> Curvature:
        """A new curvature with the graph of its gradient."""
        self.curvature = self.loop.curvature(self.batches[Stream.LOWER])
        _ = self.curvature.gradient
        return self.curvature

    def functions(self) -> dict[str, tuple[Callable[[], Any], int]]:
        """Returns each part with the number of images that a call works on."""
        loop, lower, upper = self.loop, Stream.LOWER, Stream.UPPER
        pairs, labelled = self.sources[lower].batch_size, self.sources[upper].batch_size
        evaluated: Any = loop.trainer.eval_dataset
        return {
            UNIT: (lambda: loop.forward_backward(self.batches[lower]), pairs),
            "reading": (lambda: self.sources[lower].read(self.keys[lower]), pairs),
            "views": (lambda: loop.views(self.raw[lower], self.keys[lower]), pairs),
            "views by Pillow, one process": (lambda: self._pillow_views(pairs), pairs),
            "lower step": (lambda: loop.lower_step(self.batches[lower]), pairs),
            "lower optimizer": (lambda: loop.move(loop.lower_optimizer, self.lower_gradient), 0),
            "linearisation": (self.linearise, pairs),
            "product": (lambda: self.curvature(self.rhs), pairs),
            BASELINE_UNIT: (lambda: self.baseline.forward_backward(self.baseline_batch), pairs),
            "baseline's product": (lambda: self.baseline.product(self.baseline_batch, self.rhs), pairs),
            "upper gradients": (self.upper_gradients, labelled),
            "upper optimizer": (lambda: loop.move(loop.upper_optimizer, self.upper_gradient), 0),
            "evaluation": (lambda: loop.trainer.evaluate(), len(evaluated)),
        }

    def _pillow_views(self, rows: int) -> None:
        for row in range(rows):
            self.baseline.datasets[Stream.LOWER][row]


@dataclass(frozen=True)
class MeasuredParts:
    """What the parts took, and the machine's memory bandwidth.

    Args:
        parts (`list[Part]`): the unit first.
        bandwidth (`float`): bytes per second.
    """

    parts: list[Part]
    bandwidth: float

    def __getitem__(self, name: str) -> Part:
        return next(part for part in self.parts if part.name == name)

    def costs(self, unit: str = UNIT) -> CostModel:
        """Returns what work should cost in units of a part."""
        part = self[unit]
        return CostModel.measured(part.work, median(part.seconds), bandwidth=self.bandwidth)

    def summaries(self) -> list[dict[str, Any]]:
        """Returns the table of parts."""
        return [part.summary(self[UNIT], self.costs()) for part in self.parts]


def measure_parts(of_alternation: PartsOfAlternation, *, repeats: int) -> MeasuredParts:
    """Measures all parts, interleaved.

    Args:
        of_alternation ([`PartsOfAlternation`])
        repeats (`int`): rounds.
    """
    functions, device = of_alternation.functions(), of_alternation.loop.device
    parts = []
    # In this order: a product needs the linearisation before it, since a lower step moves what it was made at.
    for name, (function, images) in functions.items():
        part = Part(name, images, work=NO_WORK if name in _WITHOUT_COUNT else count_work(function))
        with SynchronisationCounter(device) as counter:
            function()
        part.synchronisations = counter.count
        with watched_memory(device) as memory:
            function()
        part.peak_bytes = memory.grown
        parts.append(part)
    times = interleaved_seconds({name: function for name, (function, _) in functions.items()}, device, repeats=repeats)
    for part in parts:
        part.seconds = times[part.name]
    return MeasuredParts(parts, memory_bandwidth(device, repeats=repeats))
