"""What a part of an alternation should cost, in forward-backward equivalents.

A computation takes time for its floating-point operations and for moving its tensors through memory. One forward and
backward pass, the unit, shows how fast the machine computes, and a plain addition of large tensors how fast it moves
them. What anything else should cost follows from its own operations and bytes.
"""

from dataclasses import dataclass
from statistics import median

import torch

from .measuring import Work, count_work, interleaved_seconds

# Each tensor of the addition is larger than the caches of processors and GPUs.
_ADDED_BYTES = 128 * 2**20


@dataclass(frozen=True)
class CostModel:
    """Costs of work, in units.

    Args:
        unit (`Work`): work of the unit.
        traffic_share (`float`): share of the unit's time that goes to its traffic.
    """

    unit: Work
    traffic_share: float

    @classmethod
    def measured(cls, unit: Work, seconds: float, *, bandwidth: float) -> "CostModel":
        """Returns the model of a machine on which the unit takes `seconds` and memory moves `bandwidth` bytes per
        second. Whatever of the unit's time is not traffic is arithmetic."""
        return cls(unit, min(1.0, unit.traffic / bandwidth / seconds))

    def equivalents(self, work: Work) -> float:
        """Units that some work should take."""
        arithmetic, traffic = work.flops / self.unit.flops, work.traffic / self.unit.traffic
        return (1 - self.traffic_share) * arithmetic + self.traffic_share * traffic

    def arithmetic_alone(self, work: Work) -> float:
        """Units that some work would take if traffic cost nothing."""
        return work.flops / self.unit.flops


def memory_bandwidth(device: torch.device, *, repeats: int) -> float:
    """Returns the bytes per second that the addition of two large tensors reads and writes, a median."""
    first, second, total = (torch.ones(_ADDED_BYTES // 4, device=device) for _ in range(3))

    def add() -> None:
        torch.add(first, second, out=total)

    times = interleaved_seconds({"addition": add}, device, repeats=repeats)
    return count_work(add).traffic / median(times["addition"])
