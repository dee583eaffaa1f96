"""Means of making an alternation faster are tried on the same arithmetic."""

import pytest
import torch

from bissl_hf.benchmark import trials
from bissl_hf.benchmark.loops import plain_conjugate_gradient
from bissl_hf.benchmark.trials import trial_rows, try_means

from .test_benchmark import TINY

CPU = torch.device("cpu")
FASTER = ("_compiled_lower_step", "_compiled_product")


def bench():
    return trials._Bench(TINY, CPU)


def test_both_ways_of_a_trial_take_the_same_products():
    for trial in (*trials._kept_graph(bench()), *trials._solver_in_place(bench())):
        old, new = trial.old(), trial.new()
        new = new[0] if isinstance(new[0], tuple) else new  # a solution comes with an account
        for first, second in zip(old, new, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_all_means_run_and_are_told_with_their_range(monkeypatch):
    monkeypatch.setattr(trials, "_TRIALS", [t for t in trials._TRIALS if t.__name__ not in FASTER])
    said = []
    found = try_means(CPU, workload=TINY.changed(repeats=2), say=said.append)
    assert len(said) == len(found) == 11
    assert all(0 < trial["smallest"] <= trial["ratio"] <= trial["largest"] for trial in found)
    assert {row["kept"] for row in trial_rows(found)} >= {"yes", "no"}


def test_images_on_the_device_are_read_as_a_batch_is():
    (trial,) = trials._images_on_the_device(bench())
    assert trial.old()["pixel_values"].shape == trial.new().shape == (6, 3, 16, 16)
    assert trial.old()["pixel_values"].dtype == trial.new().dtype == torch.uint8


@pytest.mark.gpu
def test_means_that_need_a_gpu_run_there():
    found = try_means(torch.device("cuda", 0), workload=TINY.changed(bf16=True, repeats=2), say=lambda text: None)
    names = [trial["trial"] for trial in found if "ratio" in trial]
    assert {"images held on the device as uint8", "views of the next batch on a side stream"} <= set(names)


def test_what_a_machine_cannot_run_is_told_and_the_others_go_on(monkeypatch):
    def _broken_means(bench):
        yield trials.Trial("never timed", lambda: None, fail, "no")

    monkeypatch.setattr(trials, "_TRIALS", (_broken_means, trials._kept_graph))
    found = try_means(CPU, workload=TINY, say=lambda text: None)
    assert found[0] == {"trial": "broken means", "error": "no compiler"}
    assert found[1]["ratio"] > 0
    assert trial_rows(found)[0]["old time by new"] == "did not run: no compiler"


def fail():
    raise RuntimeError("no compiler\nand a long list")


def test_textbook_conjugate_gradient_solves():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    matrix, rhs = root @ root.T + torch.eye(6), torch.randn(6, generator=generator, dtype=torch.float64)
    (solution,) = plain_conjugate_gradient(lambda vector: (matrix @ vector[0],), (rhs,), 6)
    torch.testing.assert_close(matrix @ solution, rhs, rtol=1e-8, atol=1e-8)


def test_what_is_compiled_computes_the_same(monkeypatch):
    """Compilers take minutes; what they are given, the second derivative traced into one function, runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    for build in (trials._compiled_lower_step, trials._compiled_product):
        (trial,) = build(bench())
        old, new = trial.old(), trial.new()
        for first, second in zip(flat(old), flat(new), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def flat(result):
    """Returns the tensors of a vector, or of a loss and a vector."""
    return [tensor for part in result for tensor in (part if isinstance(part, tuple) else (part,))]
