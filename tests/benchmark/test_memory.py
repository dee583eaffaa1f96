"""What a call allocates, and the memory of a curvature in each of its modes."""

import pytest
import torch

from bissl_hf.benchmark.measuring import Allocated, allocated_by
from bissl_hf.benchmark.memory import measure_memory, memory_rows

from .test_benchmark import TINY

CPU = torch.device("cpu")
MIB = 2**20


def test_allocations_are_counted_to_the_byte():
    def hold_the_last():
        first = torch.ones(8 * MIB, dtype=torch.uint8)
        second = torch.ones(4 * MIB, dtype=torch.uint8)
        del first
        return second, torch.ones(2 * MIB, dtype=torch.uint8)

    taken = allocated_by(hold_the_last, CPU)
    assert taken.peak == pytest.approx(12 * MIB, abs=4096)
    assert taken.held == pytest.approx(6 * MIB, abs=4096)
    assert allocated_by(lambda: None, CPU) == Allocated(0, 0)


@pytest.fixture(scope="module")
def found():
    workload = TINY.changed(image_size=32)
    return measure_memory(CPU, workload=workload, sizes=((8, 32, 64),), say=lambda text: None)


@pytest.mark.slow
def test_each_way_holds_what_its_mode_says(found):
    """The graph that `cached` keeps grows with the batch, `recompute` holds a gradient, and parts one at a time."""
    peak = {(taken["way"], taken["pairs"]): taken["peak_bytes"] for taken in found}
    held = {(taken["way"], taken["pairs"]): taken["held_bytes"] for taken in found}
    assert held["cached", 64] - held["cached", 32] > MIB
    assert held["recompute", 64] - held["recompute", 32] < 0.1 * MIB
    growth = {way: peak[way, 64] - peak[way, 32] for way, _ in peak}
    assert growth["recompute"] > 2 * MIB
    assert growth["parts of 16"] < growth["recompute"] / 2  # embeddings, no graph
    assert peak["forward and backward", 64] < peak["cached", 64]


@pytest.mark.slow
def test_memory_reads_as_a_table(found):
    rows = memory_rows(found)
    assert [(row["channels"], row["pairs"]) for row in rows] == [("8", "32"), ("8", "64")]
    assert set(rows[0]) == {"channels", "pairs", "forward and backward", "cached", "recompute", "parts of 16"}


@pytest.mark.gpu
def test_allocations_on_a_gpu_are_those_of_its_allocator():
    device = torch.device("cuda", 0)
    taken = allocated_by(lambda: torch.ones(8 * MIB, dtype=torch.uint8, device=device)[: 2 * MIB].clone(), device)
    assert taken == Allocated(10 * MIB, 2 * MIB)
