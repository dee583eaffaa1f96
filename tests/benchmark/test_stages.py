"""A benchmark by stages: each leaves a file, and a later call goes on with those that are missing."""

import json
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bissl_hf.benchmark import stages
from bissl_hf.benchmark.curvatures import UNIT, curvature_rows, measure_curvatures
from bissl_hf.benchmark.stages import STAGES, Stage
from bissl_hf.cli import benchmark

from .test_benchmark import TINY

CPU = torch.device("cpu")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stages that note their name and measure nothing; the second one fails once."""
    done: list[str] = []

    def stage(name: str) -> Stage:
        def measure(workload: Any, device: Any) -> dict[str, Any]:
            done.append(name)
            if name == "alternation" and done.count(name) == 1:
                raise RuntimeError("the machine was switched off")
            return {"figure": workload.image_size}

        return Stage(measure, lambda report: f"{name}: {report['figure']}", STAGES[name].has_rounds)

    monkeypatch.setattr(stages, "STAGES", {name: stage(name) for name in STAGES})
    monkeypatch.setattr(benchmark, "STAGES", stages.STAGES)
    return done


def run(folder: Path, *arguments: str) -> None:
    benchmark.main(["--quick", "--use_cpu", "--output_dir", str(folder), *arguments])


def test_a_later_call_goes_on_with_what_is_missing(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("--image_size", "48", "--repeats", "2", "--stages", "curvatures", "alternation")
    with pytest.raises(RuntimeError, match="switched off"):
        run(tmp_path, *settings)
    assert [path.name for path in tmp_path.glob("*.json")] == ["curvatures.json"]
    run(tmp_path, *settings)
    assert measured == ["curvatures", "alternation", "alternation"]
    printed = capsys.readouterr().out
    assert "curvatures (measured before)" in printed
    assert "alternation: 48" in printed
    report = json.loads((tmp_path / "alternation.json").read_text())
    assert report["figure"] == report["workload"]["image_size"] == 48
    assert report["workload"]["repeats"] == 2
    assert report["machine"]["torch"] == torch.__version__


def test_figures_of_other_sizes_are_not_mixed(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--stages", "curvatures")
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, "--stages", "curvatures", "memory", "--image_size", "64")
    assert stop.value.code == 2
    message = "curvatures.json of another benchmark: image_size was 32 and is 64. Choose another folder"
    assert message in " ".join(capsys.readouterr().err.split())
    assert measured == ["curvatures"]


@pytest.mark.parametrize("content", ["{", "[]", "3", '{"machine": {}}'])
def test_a_damaged_file_is_named(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (tmp_path / "curvatures.json").write_text(content)
    with pytest.raises(SystemExit):
        run(tmp_path, "--stages", "curvatures")
    message = " ".join(capsys.readouterr().err.split())
    assert "curvatures.json is no report of a stage: " in message
    assert "Remove it to measure the stage again." in message
    assert measured == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "speed"], "stages is speed; it must be some of curvatures, alternation, growth, memory"),
        (["--repeats", "0"], "repeats is 0; it must be at least 1"),
        (["--image_size", "8"], "image_size is 8; it must be at least 16"),
        (["--stages", "growth", "--image_size", "64"], "image_size is 64, and stage growth does not take it"),
        (["--stages", "memory", "--repeats", "3"], "repeats is 3, and stage memory does not take it"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "new", *arguments)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert measured == []
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    workload = TINY.changed(image_size=32, width=8, lower_batch=32, repeats=3)
    measured: list[dict[str, Any]] = json.loads(json.dumps(measure_curvatures(workload, CPU, say=lambda text: None)))
    return measured


def test_every_kind_of_curvature_is_measured_in_units_of_one_pass(found: list[dict[str, Any]]) -> None:
    parts = {part["part"]: part for part in found}
    kinds = ("hessian", "gauss_newton")
    assert set(parts) == {UNIT, *(f"{kind}: {part}" for kind in kinds for part in ("linearisation", "product"))}
    unit = median(parts[UNIT]["seconds"])
    for part in parts.values():
        assert len(part["seconds"]) == 3
        assert part["units"] == pytest.approx(median(part["seconds"]) / unit)
    assert parts[UNIT]["units"] == 1


def test_a_gauss_newton_product_needs_less_memory_than_a_hessian_one(found: list[dict[str, Any]]) -> None:
    peaks = {part["part"]: part["peak_bytes"] for part in found if part["peak_bytes"] is not None}
    assert peaks[UNIT] <= peaks["gauss_newton: product"] < peaks["hessian: product"]
    rows = {row["part"]: row for row in curvature_rows(found)}
    assert rows[UNIT]["units"] == rows[UNIT]["of the unit's"] == "1.00"
    assert rows["hessian: linearisation"]["peak MiB"] == ""


def test_every_stage_shows_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = [{"width": 8, "pairs": 4, "way": "cached", "peak_bytes": 3 * 2**20, "held_bytes": 2**20}]
    monkeypatch.setattr(stages, "measure_memory", lambda device, workload: memory)
    report = stages.run_stage(tmp_path, "memory", TINY, CPU)
    assert report["memory"] == memory
    assert "3, 1" in STAGES["memory"].show(report)
    assert stages.run_stage(tmp_path, "memory", TINY, CPU)["memory"] == memory
