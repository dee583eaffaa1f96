"""Seconds, operations, memory and waits for the device."""

import pytest
import torch

from bissl_hf.benchmark.measuring import (
    SynchronisationCounter,
    Work,
    count_work,
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
    moved = 4 * (12 + 20 + 15)
    assert count_work(lambda: a @ b) == Work(2 * 3 * 4 * 5, moved, least_traffic=moved)
    assert count_work(lambda: (a @ b).sum().backward()).flops == 3 * 2 * 3 * 4 * 5


X, Y, OUT = torch.rand(10, dtype=torch.float64), torch.rand(10, dtype=torch.float64), torch.empty(10).double()


@pytest.mark.parametrize(
    ("function", "tensors"),
    [
        (lambda: torch.add(X, Y), 3),
        (lambda: torch.add(X, Y, out=OUT), 3),
        (lambda: OUT.add_(Y), 3),
        (lambda: torch._foreach_add([X, X], [Y, Y]), 6),
        (lambda: torch._foreach_add_([OUT, OUT], [Y, Y]), 6),
        (lambda: torch.cat([X, Y]), 4),
        (lambda: torch.zeros(10, dtype=torch.float64), 1),
        # No more than what lies in memory: two numbers for the ten of the first argument.
        (lambda: X[:2, None].expand(2, 5) + Y.view(2, 5), 2.2),
        # Nothing moves.
        (lambda: X.view(2, 5).t().detach(), 0),
        (lambda: torch.empty_like(X), 0),
        (lambda: X[:0], 0),
    ],
)
def test_traffic_is_what_operators_read_and_write(function, tensors):
    assert count_work(function).traffic == round(tensors * 80)


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
