"""Seconds, operations, memory and waits for the device."""

import pytest
import torch

from bissl_hf.benchmark.measuring import (
    SynchronisationCounter,
    count_flops,
    interleaved_seconds,
    median_ratio,
    watched_memory,
)

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.masked_fill_(x > 0, 0.0) if x.max() > 0 else x,
        lambda x: torch.equal(x, x),
        lambda x: torch.nonzero(x),
    ],
)
def test_each_read_of_a_value_counts_once(read):
    with SynchronisationCounter(CPU) as counter:
        read(torch.ones(3))
    assert counter.count == 1, counter.found


def test_arithmetic_on_the_device_does_not_count():
    x = torch.ones(3, requires_grad=True)
    with SynchronisationCounter(CPU) as counter:
        torch.where(x > 0, x, 0.0).sum().backward()
        x.grad.copy_(torch.zeros(3))
        x.detach()[torch.tensor([0, 2])] += 1
    assert counter.found == []


def test_only_blocking_copies_between_devices_count():
    """The device `meta` stands for one that is not the host's."""
    here, there = torch.ones(3), torch.empty(3, device=META)
    with SynchronisationCounter(META) as counter:
        here.to(META, non_blocking=True)
        there.copy_(here, non_blocking=True)
        float(here.sum())  # the host's own
        assert counter.count == 0
        here.to(META)
        there.copy_(here)
    assert counter.count == 2


def test_operations_of_a_product_and_its_backward_pass_are_counted():
    a, b = torch.rand(3, 4, requires_grad=True), torch.rand(4, 5, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 4 * 5


def test_functions_are_called_in_turn_and_warmups_do_not_count():
    calls = []
    times = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, repeats=2)
    assert "".join(calls) == "ababab"
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_ratios_are_taken_round_by_round():
    """The machine is ten times slower in the second round, which cancels."""
    assert median_ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.1]) == pytest.approx(2.0)


def test_memory_that_is_given_back_shows_in_the_peak():
    with watched_memory(CPU) as memory:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 50 * 2**20 < memory.grown < 200 * 2**20
