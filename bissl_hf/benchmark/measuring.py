"""Seconds, floating-point operations, memory and waits for the device, of any piece of code."""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

_PROCESS_STATUS = Path("/proc/self/status")
_CLEAR_PEAK = Path("/proc/self/clear_refs")

# Operators that hand a value, or a size that depends on values, to Python.
_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten._unique2.default,
}

# Operators that reserve memory and leave it alone.
_RESERVES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


def wait_for(device: torch.device) -> None:
    """Returns once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(
    function: Callable[[], Any], device: torch.device, clock: Callable[[], float] = lambda: time.perf_counter()
) -> float:
    """Returns how long a call takes by a clock, the work that it leaves to the device included."""
    wait_for(device)
    start = clock()
    function()
    wait_for(device)
    return clock() - start


def steadiest_clock(device: torch.device) -> Callable[[], float]:
    """Returns the time of this process alone where one thread does all the work, so that other processes do not
    count, and else the time of the wall."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def spread(times: Sequence[float]) -> float:
    """Returns by how much the slowest of several rounds was slower than the fastest, relative to it."""
    return max(times) / min(times) - 1.0


def interleaved_seconds(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, *, repeats: int, warmups: int = 1
) -> dict[str, list[float]]:
    """Times functions in turn, so that whatever else the machine does meets all of them alike.

    Args:
        functions (`Mapping[str, Callable]`): what to time, by name.
        device (`torch.device`): where they work.
        repeats (`int`): rounds that count.
        warmups (`int`, *optional*, defaults to 1): rounds before them that do not.

    Returns:
        `dict[str, list[float]]`: seconds of each round, by [`steadiest_clock`].
    """
    clock = steadiest_clock(device)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmups + repeats):
        for name, function in functions.items():
            spent = seconds(function, device, clock)
            if number >= warmups:
                times[name].append(spent)
    return times


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Returns the median over rounds of the ratio of two times measured in the same round."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


@dataclass(frozen=True)
class Work:
    """What a computation does, whatever it runs on.

    Args:
        flops (`int`): floating-point operations of matrix products and convolutions.
        traffic (`int`): bytes that its operators read and write, were nothing kept in caches.
        least_traffic (`int`): those of matrix products and convolutions alone, into which everything else could in
            principle be fused.
    """

    flops: int
    traffic: int
    least_traffic: int = 0


def count_work(function: Callable[[], Any]) -> Work:
    """Returns the work of a call, backward passes included.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.benchmark.measuring import count_work
    >>> a, b = torch.rand(2, 3), torch.rand(3, 4)
    >>> count_work(lambda: a @ b)  # 2 * 2 * 3 * 4 operations on 6, 12 and 8 numbers of 4 bytes
    Work(flops=48, traffic=104, least_traffic=104)
    ```
    """
    with FlopCounterMode(display=False) as flops, _TrafficCounter() as traffic:
        function()
    return Work(flops.get_total_flops(), traffic.bytes, traffic.least_bytes)


class _TrafficCounter(TorchDispatchMode):
    """Adds up the bytes of the tensors that go into operators and come out of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.least_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func not in _RESERVES:
            tensors = tree_leaves((_read_and_written(func, args, kwargs or {}), _made(func, result)))
            moved = sum(_bytes_in_memory(tensor) for tensor in tensors if isinstance(tensor, Tensor))
            self.bytes += moved
            self.least_bytes += moved if func._overloadpacket in flop_registry else 0
        return result


def _read_and_written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """Arguments of an operator, those that it changes twice; the target of a result (`out`) is only written."""
    found = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        changes = argument.alias_info is not None and argument.alias_info.is_write
        found += [value] * (2 if changes and not argument.kwarg_only else 1)
    return found


def _made(func: Any, result: Any) -> list[Any]:
    """Results of an operator that are none of its arguments."""
    results = result if isinstance(result, tuple) else (result,)
    return [value for returned, value in zip(func._schema.returns, results, strict=False) if not returned.alias_info]


def _bytes_in_memory(tensor: Tensor) -> int:
    """Bytes of a tensor, entries that share their memory counted once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size() if tensor.numel() else 0


class SynchronisationCounter(TorchDispatchMode):
    """Counts where the host waits for the device, or would if its tensors lay on one: values read from tensors
    (`item`, `float`, `bool`, boolean indices), and copies between host and device that do not go on in the background.

    It works on any device, the `meta` one included, and slows code down: count and time in different runs.

    Args:
        device (`torch.device`): reads of tensors on other devices are free.

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf.benchmark.measuring import SynchronisationCounter
    >>> with SynchronisationCounter(torch.device("cpu")) as counter:
    ...     size = float(torch.ones(3).sum())
    >>> counter.count
    1
    ```
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.found: list[str] = []

    @property
    def count(self) -> int:
        """How often so far."""
        return len(self.found)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = func in _READS and args[0].device.type == self.device.type
        if reads or _waits_for_copy(func, args, kwargs) or _indexes_by_mask(func, args):
            self.found.append(str(func))
        return func(*args, **kwargs)


def _waits_for_copy(func: Any, args: Any, kwargs: Any) -> bool:
    if func is torch.ops.aten._to_copy.default:
        target = kwargs.get("device")
        return target is not None and target.type != args[0].device.type and not kwargs.get("non_blocking", False)
    if func is torch.ops.aten.copy_.default:
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        # A number from the host is written by a kernel, without a copy.
        return args[0].device.type != args[1].device.type and not non_blocking
    return False


def _indexes_by_mask(func: Any, args: Any) -> bool:
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


@dataclass
class PeakMemory:
    """Memory in use, in bytes: of the device's allocator, or on a CPU of the whole process.

    Args:
        before (`int`): at the start.
        peak (`int`): the largest since; known once the watch is over.
    """

    before: int
    peak: int = 0

    @property
    def grown(self) -> int:
        """How far the peak is above the start."""
        return self.peak - self.before


@dataclass(frozen=True)
class Allocated:
    """Memory that torch allocates for a call, in bytes.

    Args:
        peak (`int`): the most at one time.
        held (`int`): what is left at the end, for the result among others.
    """

    peak: int
    held: int


def allocated_by(function: Callable[[], Any], device: torch.device) -> Allocated:
    """Returns what a call allocates beyond what there was: on a CPU from a list of all allocations and releases, on a
    GPU from its allocator's statistics."""
    if device.type == "cuda":
        with watched_memory(device) as memory:
            result = function()
        held = torch.cuda.memory_allocated(device) - memory.before
        del result
        return Allocated(memory.grown, held)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # some builds print each start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    running = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    del result
    return Allocated(max([0, *running]), running[-1] if running else 0)


@contextmanager
def watched_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Watches the memory in use on a device while the context lasts."""
    wait_for(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        memory = PeakMemory(torch.cuda.memory_allocated(device))
    else:
        _CLEAR_PEAK.write_text("5")
        memory = PeakMemory(_process_bytes("VmRSS"))
    yield memory
    wait_for(device)
    memory.peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process_bytes("VmHWM")


def _process_bytes(field: str) -> int:
    for line in _PROCESS_STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_PROCESS_STATUS} has no line {field}; the memory of a process is known on Linux only.")
