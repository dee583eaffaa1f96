"""The parts of an alternation one by one: seconds, images per second, and forward-backward equivalents.

The unit is one forward and backward pass of the pretext model on a lower batch whose views are ready. What a part
should cost is its floating-point operations over those of the unit; what it costs is its time over the unit's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

from ..data.alternation import StepKey, Stream
from ..hypergradient import Curvature
from ..tensors import add_scaled
from .loops import BareLoop, Baseline
from .measuring import SynchronisationCounter, count_flops, interleaved_seconds, watched_memory

UNIT = "forward and backward"


@dataclass
class Part:
    """One part, measured.

    Args:
        name (`str`)
        images (`int`): how many one call works on; 0 where it works on weights.
        seconds (`list[float]`): of each round.
        flops (`int`): floating-point operations of a call.
        synchronisations (`int`): how often a call waits for the device.
        peak_bytes (`int`): largest memory in use during a call, beyond what was in use before it.
    """

    name: str
    images: int
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    synchronisations: int = 0
    peak_bytes: int = 0

    def summary(self, unit: "Part") -> dict[str, Any]:
        """Returns what the table shows, with equivalents of `unit`."""
        spent = median(self.seconds)
        return {
            "part": self.name,
            "seconds": spent,
            "images_per_second": self.images / spent if self.images else None,
            "equivalents": spent / median(unit.seconds),
            "expected_equivalents": self.flops / unit.flops,
            "synchronisations": self.synchronisations,
            "peak_bytes": self.peak_bytes,
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
        self.sources = loop.trainer.sources
        self.keys = {stream: StepKey(loop.args.key_seed, int(stream), 0, 0, 0) for stream in Stream}
        self.raw = {stream: self.sources[stream].read(self.keys[stream]) for stream in (Stream.LOWER, Stream.UPPER)}
        self.batches = {stream: loop.views(inputs, self.keys[stream]) for stream, inputs in self.raw.items()}
        self.baseline_batch = next(baseline.batches(Stream.CURVATURE))
        self.lower_gradient = self.forward_backward()
        self.upper_gradient = self.upper_gradients()
        self.rhs = self.upper_gradient[: len(loop.theta_p)]
        self.curvature: Curvature = self.linearise()

    def forward_backward(self) -> Any:
        """The unit: the pretext loss and its gradient."""
        model = partial(self.loop.model, level="lower")
        return self.loop.gradient(model, self.batches[Stream.LOWER], self.loop.lower_parameters)[1]

    def upper_gradients(self) -> Any:
        """Gradients of the downstream loss at theta_P and at theta_D."""
        loop, batch = self.loop, self.batches[Stream.UPPER]
        _, aligned = loop.gradient(loop.model.pure("aligned"), batch, (*loop.theta_p, *loop.phi_d))
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
            UNIT: (self.forward_backward, pairs),
            "reading": (lambda: self.sources[lower].read(self.keys[lower]), pairs),
            "views": (lambda: loop.views(self.raw[lower], self.keys[lower]), pairs),
            "views by Pillow, one process": (lambda: self._pillow_views(pairs), pairs),
            "lower step": (lambda: loop.lower_step(self.batches[lower]), pairs),
            "lower optimizer": (lambda: loop.move(loop.lower_optimizer, self.lower_gradient), 0),
            "linearisation": (self.linearise, pairs),
            "product": (lambda: self.curvature(self.rhs), pairs),
            "baseline's product": (lambda: self.baseline.product(self.baseline_batch, self.rhs), pairs),
            "upper gradients": (self.upper_gradients, labelled),
            "upper optimizer": (lambda: loop.move(loop.upper_optimizer, self.upper_gradient), 0),
            "evaluation": (lambda: loop.trainer.evaluate(), len(evaluated)),
        }

    def _pillow_views(self, rows: int) -> None:
        for row in range(rows):
            self.baseline.datasets[Stream.LOWER][row]


def measure_parts(of_alternation: PartsOfAlternation, *, repeats: int) -> list[Part]:
    """Measures all parts, interleaved.

    Args:
        of_alternation ([`PartsOfAlternation`])
        repeats (`int`): rounds.
    """
    functions, device = of_alternation.functions(), of_alternation.loop.device
    parts = []
    # In this order: a product needs the linearisation before it, since a lower step moves what it was made at.
    for name, (function, images) in functions.items():
        part = Part(name, images, flops=count_flops(function))
        with SynchronisationCounter(device) as counter:
            function()
        part.synchronisations = counter.count
        with watched_memory(device) as memory:
            function()
        part.peak_bytes = memory.grown
        parts.append(part)
    timed = {name: function for name, (function, _) in functions.items()}
    times = interleaved_seconds(timed, device, repeats=repeats)
    for part in parts:
        part.seconds = times[part.name]
    return parts
