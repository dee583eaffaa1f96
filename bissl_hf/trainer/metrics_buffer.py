"""Figures collected on the device between two logs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class MetricsBuffer:
    """Sums figures by name and averages them when they are logged, so that no step waits for the device.

    Args:
        reduce (`Callable`): averages a list of tensors over processes; called once per log.
    """

    def __init__(self, reduce: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        self._reduce = reduce
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        """Adds one value, a number or a tensor of shape `()`."""
        value = torch.as_tensor(value).detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def copy_state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Returns the sums and the counts, for `restore`."""
        return dict(self._sums), dict(self._counts)

    def restore(self, state: tuple[dict[str, Tensor], dict[str, int]]) -> None:
        """Forgets what was added since `copy_state`."""
        self._sums, self._counts = state

    def pop_averages(self) -> dict[str, float]:
        """Returns the averages over values and processes, and empties the buffer."""
        averages = {name: total / self._counts[name] for name, total in self._reduced_sums().items()}
        self._sums, self._counts = {}, {}
        return averages

    def _reduced_sums(self) -> dict[str, float]:
        """The sums averaged over processes, as numbers."""
        if not self._sums:
            return {}
        device = next((value.device for value in self._sums.values() if value.device.type != "cpu"), "cpu")
        (sums,) = self._reduce([torch.stack([total.to(device) for total in self._sums.values()])])
        return dict(zip(self._sums, sums.tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums, averaged over processes, and the counts as plain numbers."""
        return {name: [total, self._counts[name]] for name, total in self._reduced_sums().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replaces the content of the buffer."""
        self._sums = {name: torch.tensor(total, dtype=torch.float64) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}
