"""What holds for each solver in a whole run: a resume goes on to the last bit, and first-order ones build no graph of
second derivatives."""

from pathlib import Path

import pytest
import torch

from bissl_hf.bilevel.hypergradient import SOLVERS
from bissl_hf.data.alternation import Stream
from bissl_hf.trainer.bissl_trainer import BiSSLTrainer

from .test_checkpoints import optimizer_tensors, stable_logs
from .trainers import make_trainer, same_tensors, training_logs

STEPWISE = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
RUNS = {
    "blockwise": {"solver": "blockwise_cg"},
    "gauss-newton": {"curvature_kind": "gauss_newton"},
    "gauss-newton-recycled": {"curvature_kind": "gauss_newton", "curvature_mode": "recompute", "solver": "recycled"},
    "mfac": {"solver": "mfac", "solver_memory": 4, "damping": 1.0},
    "mfac-per-tensor": {"solver": "mfac", "solver_memory": 2, "solver_per_tensor": True, "damping": 1.0},
    "identity": {"solver": "identity"},
    "none": {"solver": "none"},
    "target-pull": {
        "target_pull": 2.0, "proximal_weight": None, "damping": "auto", "lower_optim": "lars",
        "lower_learning_rate": 1.0, "curvature_kind": "gauss_newton",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_same_run_with_every_solver(tmp_path, name):
    """From inside an upper phase, and from the end of a lower one."""
    settings = {"num_alternations": 2, **STEPWISE, **RUNS[name]}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    for step in (4, 8):
        resumed = make_trainer(tmp_path / "resumed", **settings)
        torch.manual_seed(step)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == whole.state.global_step == 10
        assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
        assert same_tensors(optimizer_tensors(resumed), optimizer_tensors(whole))
        assert stable_logs(resumed) == stable_logs(whole)
    if "target_pull" in settings:
        assert len({log["levels/proximal_weight"] for log in training_logs(whole)}) > 1, "lambda must be corrected"


def test_runs_of_every_solver_are_resumed_in_some_test():
    """Here, and `cg` and `recycled` with the tests of checkpoints."""
    assert {settings.get("solver", "cg") for settings in RUNS.values()} == set(SOLVERS)


class SecondOrder:
    """Counts what second derivatives are made with: graphs of gradients, forward-mode tangents, curvature batches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs = self.tangents = 0
        self.streams: set[Stream] = set()
        for name in ("grad", "backward"):
            monkeypatch.setattr(torch.autograd, name, self._watching(getattr(torch.autograd, name)))
        make_dual = torch.autograd.forward_ad.make_dual
        monkeypatch.setattr(torch.autograd.forward_ad, "make_dual", self._counting_tangents(make_dual))

    def _watching(self, function):
        def watched(*args, **kwargs):
            self.graphs += bool(kwargs.get("create_graph"))
            return function(*args, **kwargs)

        return watched

    def _counting_tangents(self, function):
        def counted(*args, **kwargs):
            self.tangents += 1
            return function(*args, **kwargs)

        return counted

    def attach(self, trainer: BiSSLTrainer) -> BiSSLTrainer:
        read = trainer.streams.read

        def watched(key):
            self.streams.add(Stream(key.stream))
            return read(key)

        trainer.streams.read = watched  # type: ignore[method-assign]
        return trainer


@pytest.mark.parametrize("solver", [name for name, solver in SOLVERS.items() if not solver.second_order])
def test_a_first_order_solver_builds_no_graph_and_reads_no_curvature_batch(tmp_path, monkeypatch, solver):
    seen = SecondOrder(monkeypatch)
    trainer = seen.attach(make_trainer(tmp_path, solver=solver, lower_optim="lars", lower_learning_rate=1.0))
    trainer.train()
    assert (seen.graphs, seen.tangents) == (0, 0)
    assert Stream.CURVATURE not in seen.streams
    assert all("alignment/cosine" in log for log in training_logs(trainer)), "taken from the last lower gradient"


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_a_second_order_solver_is_seen_by_the_same_watch(tmp_path, monkeypatch, kind):
    seen = SecondOrder(monkeypatch)
    seen.attach(make_trainer(tmp_path, solver="cg", curvature_kind=kind)).train()
    assert seen.graphs > 0
    assert bool(seen.tangents) is (kind == "gauss_newton")
    assert Stream.CURVATURE in seen.streams


def test_first_order_checkpoints_hold_no_directions(tmp_path: Path):
    """Of `mfac` they hold the gradients, as many as there are so far and are kept."""
    trainer = make_trainer(tmp_path, solver="mfac", solver_memory=4)
    trainer.train()
    state = trainer.upper_phase.state_dict()
    assert len(trainer.upper_phase._memory) == 4
    assert set(state) == {"halvings", "alternation", "memory"}
