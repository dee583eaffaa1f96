"""What an upper phase remembers, on two processes: directions of earlier solves, and how the curvature fits all."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bissl_hf.distributed import rank, world_size

from ..processes import run_in_processes
from .test_processes import build, layer_norm_model, logged
from .trainers import same_tensors

RECYCLED = {
    "solver": "recycled",
    "solver_tolerance": 1e-5,
    "solver_max_iterations": 4,
    "upper_steps": 3,
    "damping": 60.0,
}
INSIDE = (4, 10)  # steps inside the upper phases of the first and the second alternation


def recycled_run(folder: Path, resume_from: str | None = None, **changes: Any) -> dict[str, Any]:
    trainer = build(folder, layer_norm_model(rank()), num_alternations=2, **RECYCLED, **changes)
    trainer.train(resume_from_checkpoint=resume_from)
    return {"model": trainer.model.state_dict(), "logs": [row for row in logged(trainer) if "loss" in row]}


def all_runs(folder: Path) -> None:
    results = {"recycled": recycled_run(folder / "run", save_strategy="steps", save_steps=2, save_total_limit=None)}
    if world_size() > 1:
        for step in INSIDE:
            results[f"resumed at {step}"] = recycled_run(folder / f"resumed-{step}", f"{folder}/run/checkpoint-{step}")
    torch.save({"world size": world_size(), **results}, folder / f"rank-{rank()}.pt")


def results_in(folder: Path, processes: int) -> list[dict[str, Any]]:
    results = [torch.load(folder / f"rank-{number}.pt", weights_only=False) for number in range(processes)]
    assert [result["world size"] for result in results] == [processes] * processes
    return results


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    all_runs(folder)
    return results_in(folder, 1)[0]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    run_in_processes(all_runs, 2, folder)
    return results_in(folder, 2)


@pytest.mark.distributed
def test_a_run_that_recycles_is_that_of_one_process(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    expected = one["recycled"]
    assert [row["solver/iterations"] < 4 for row in expected["logs"]] == [True, True], "directions must save products"
    for result in two:
        found = result["recycled"]
        torch.testing.assert_close(found["model"], expected["model"], rtol=0, atol=1e-9)
        assert same_tensors(found["model"], two[0]["recycled"]["model"])
        for row, wanted in zip(found["logs"], expected["logs"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.distributed
@pytest.mark.parametrize("step", INSIDE)
def test_a_resume_inside_an_upper_phase_finds_the_directions_on_every_process(
    two: list[dict[str, Any]], step: int
) -> None:
    for result in two:
        assert same_tensors(result[f"resumed at {step}"]["model"], result["recycled"]["model"])
        last, wanted = result[f"resumed at {step}"]["logs"][-1], result["recycled"]["logs"][-1]
        assert last["solver/iterations"] == wanted["solver/iterations"]
