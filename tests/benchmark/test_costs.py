"""What parts should cost, by their operations and their bytes."""

import pytest
import torch

from bissl_hf.benchmark.costs import CostModel, memory_bandwidth
from bissl_hf.benchmark.measuring import Work, seconds

CPU = torch.device("cpu")
UNIT = Work(flops=1000, traffic=100)


def test_costs_are_those_of_a_machine_with_two_speeds():
    """A machine of 500 operations and 200 bytes per second, which does nothing at once."""
    spent = 1000 / 500 + 100 / 200
    costs = CostModel.measured(UNIT, spent, bandwidth=200.0)
    assert costs.traffic_share == pytest.approx(0.2)
    for flops, traffic in ((1000, 100), (3000, 500), (0, 50), (700, 0)):
        assert costs.equivalents(Work(flops, traffic)) == pytest.approx((flops / 500 + traffic / 200) / spent)
    assert costs.arithmetic_alone(Work(3000, 500)) == pytest.approx(3.0)


def test_a_unit_faster_than_memory_is_all_traffic():
    """Caches hold what the count sends through memory."""
    costs = CostModel.measured(UNIT, 0.1, bandwidth=200.0)
    assert costs.equivalents(Work(flops=5000, traffic=300)) == pytest.approx(3.0)


def test_the_bandwidth_predicts_a_copy():
    first, second = torch.rand(2**25), torch.empty(2**25)
    expected = 2 * first.numel() * 4 / memory_bandwidth(CPU, repeats=5)
    second.copy_(first)
    assert 0.3 < min(seconds(lambda: second.copy_(first), CPU) for _ in range(5)) / expected < 3
