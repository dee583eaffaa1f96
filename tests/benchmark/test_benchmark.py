"""The benchmark's loops compute what the trainer does, and its report says what was measured."""

import copy
import json
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch

from bissl_hf.benchmark import run
from bissl_hf.benchmark.claims import Claim, Measured, make_claims
from bissl_hf.benchmark.comparison import PhaseClock, SynchronisationWatch
from bissl_hf.benchmark.loops import BareLoop, Baseline, KeptGraphBaseline
from bissl_hf.benchmark.parts import BASELINE_UNIT, UNIT, MeasuredParts, Part
from bissl_hf.benchmark.pillow_views import PillowViews
from bissl_hf.benchmark.report import format_report
from bissl_hf.benchmark.run import raise_damping, run_benchmark
from bissl_hf.benchmark.stages import DEFAULT_STAGES
from bissl_hf.benchmark.workload import WORKLOADS, benchmark_images, build_model, build_trainer
from bissl_hf.bilevel.linear_solve import SolveStatus
from bissl_hf.cli import benchmark
from bissl_hf.data.alternation import Stream

CPU = torch.device("cpu")
TINY = WORKLOADS["quick"].changed(
    image_size=16, width=4, lower_batch=6, upper_batch=4, lower_steps=1, upper_steps=2, products=2,
    pretrain_steps=1, pretrain_batch=6, repeats=1, evaluation_images=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def report():
    said = []
    found = run_benchmark(TINY, CPU, say=said.append)
    assert len(said) == 5
    return json.loads(json.dumps(found))


@pytest.mark.slow
def test_every_part_is_measured_and_the_unit_costs_itself(report):
    parts = {part["part"]: part for part in report["parts"]}
    assert parts[UNIT]["equivalents"] == parts[UNIT]["expected_equivalents"] == 1
    assert {"reading", "views", "lower step", "linearisation", "product", "upper gradients", "evaluation"} < set(parts)
    assert all(part["seconds"] > 0 for part in parts.values())
    # A product on a kept graph is two forward-backward passes, one on a new graph three, less what the first layer
    # saves.
    arithmetic = {name: part["arithmetic_alone"] for name, part in parts.items()}
    # The baseline's, by torch's own second derivatives, takes the cotangent of the images, too.
    ours = arithmetic["linearisation"] + arithmetic["product"]
    assert ours < arithmetic["baseline's product"] < 1.1 * ours
    assert 1.0 < arithmetic["product"] < 2.1
    assert 0.7 < arithmetic["linearisation"] < 1.05
    # The optimizer takes no operations that are counted, and its bytes.
    assert arithmetic["lower optimizer"] == 0 < parts["lower optimizer"]["expected_equivalents"]
    assert parts["reading"]["expected_equivalents"] is None
    assert 0 < report["traffic_share"] <= 1


@pytest.mark.slow
def test_runners_take_turns_and_solves_take_all_products(report):
    assert {name: len(phases["upper"]["all"]) for name, phases in report["alternations"].items()} == {
        "trainer": 1, "bare loop": 1, "recycled": 1, "baseline": 1, "kept graph": 1,
    }  # fmt: skip
    products = next(claim for claim in report["claims"] if claim["name"].startswith("products of each solve"))
    assert products["value"] == TINY.products


def with_spread_of_the_unit(report, spread):
    parts = [{**part, "spread": spread} if part["part"] == UNIT else part for part in report["parts"]]
    alone = next(part["seconds"] for part in parts if part["part"] == BASELINE_UNIT)
    baseline = {**report["alternations"]["baseline"], "unit": {"median": alone, "all": [alone]}}
    return {**report, "parts": parts, "alternations": {**report["alternations"], "baseline": baseline}}


@pytest.mark.slow
def test_the_report_reads_as_tables(report):
    text = format_report(with_spread_of_the_unit(report, 0.05))
    for words in ("forward and backward", "trainer / bare loop", "in the upper phase", "holds", "MB moved"):
        assert words in text
    assert "no verdict" not in text


@pytest.mark.slow
def test_nothing_is_judged_on_a_machine_that_is_too_busy(report):
    text = format_report(with_spread_of_the_unit(report, 0.25))
    assert "No verdict: the unit took up to 25 % longer in some rounds" in text
    assert "no verdict" in text
    assert not any(word in text for word in ("holds", "MISSED"))
    slower = with_spread_of_the_unit(report, 0.0)
    slower["alternations"]["baseline"]["unit"]["all"][0] *= 3  # beside the alternations, by the clock on the wall
    assert "No verdict: the unit took up to 200 % longer" in format_report(slower)


@pytest.mark.slow
def test_the_least_bytes_stand_beside_those_that_are_moved(report):
    parts = {part["part"]: part for part in report["parts"]}
    for name in (UNIT, "linearisation", "product", "baseline's product"):
        assert 0 < parts[name]["least_bytes"] < parts[name]["bytes_moved"]
    assert parts["product"]["bytes_moved"] < parts["baseline's product"]["bytes_moved"]
    unit = parts[UNIT]
    assert unit["spread"] == 0  # of one round


def test_a_benchmark_has_a_folder_of_its_own():
    """Its lock would refuse a second benchmark on the machine, were it the one of all temporary files."""
    folder = Path(build_trainer(TINY, build_model(TINY), CPU).args.output_dir)
    assert folder.parent == Path(tempfile.gettempdir())
    assert list(folder.iterdir()) == []


def test_baselines_and_bare_loop_take_the_same_upper_step():
    """The baseline is written out on its own: the same batches must lead to the same gradient."""
    torch.manual_seed(0)
    model = build_model(TINY).double()
    trainer = build_trainer(TINY, model, CPU)
    loops = [
        BareLoop(trainer, copy.deepcopy(model)),
        *(kind(trainer, copy.deepcopy(model), workers=0) for kind in (Baseline, KeptGraphBaseline)),
    ]
    generator = torch.Generator().manual_seed(1)
    curvature_batch = {"pixel_values": torch.rand(6, 2, 3, 16, 16, generator=generator, dtype=torch.float64)}
    upper_batch = {
        "pixel_values": torch.rand(4, 3, 16, 16, generator=generator, dtype=torch.float64),
        "labels": torch.tensor([0, 3, 1, 3]),
    }
    before = copy.deepcopy(model.state_dict())
    for loop in loops:
        loop.model.train()
        loop.lower_step(curvature_batch)
        loop.upper_step(curvature_batch, upper_batch)
    bare, plain, kept = (loop.model.state_dict() for loop in loops)
    moved = [name for name in before if "running" not in name and not torch.equal(before[name], bare[name])]
    assert any(name.startswith("lower") for name in moved)
    assert any(name.startswith("upper") for name in moved)
    for name in before:
        torch.testing.assert_close(bare[name], plain[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(kept[name], plain[name], rtol=1e-9, atol=1e-12)


def test_a_loop_beside_the_trainer_takes_the_same_steps_and_counts_apart(monkeypatch):
    """The clock moves by 1 in a step of the trainer, by 10 in one beside it and by 100 in one of the loop after it."""
    now = [0.0]
    monkeypatch.setattr("bissl_hf.benchmark.comparison.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("bissl_hf.benchmark.measuring.time.perf_counter", lambda: now[0])
    workload = TINY.changed(lower_steps=2, upper_steps=1)
    trainer = build_trainer(workload, build_model(workload), CPU, solver="identity", num_alternations=2)
    loops = [BareLoop(trainer, copy.deepcopy(trainer.model)) for _ in range(2)]
    for runner, names, spent in (
        (trainer, ("_lower_step", "_upper_step"), 1),
        (loops[0], ("lower_step", "upper_step"), 10),
        (loops[1], ("lower_step", "upper_step"), 100),
    ):
        for name in names:
            monkeypatch.setattr(runner, name, taking(getattr(runner, name), now, spent))
    clock = PhaseClock(
        CPU, beside={"beside": loops[0]}, after={"after": loops[1]}, units={"after": lambda: now.append(now.pop() + 7)}
    )
    trainer.add_callback(clock)
    trainer.train()
    none = [0.0, 0.0]
    assert clock.seconds == {
        "trainer": {**steps_that_take(1), "waiting": none, "log": none},
        "beside": {**steps_that_take(10), "waiting": none},
        "after": {**steps_that_take(100), "waiting": none, "unit": [7.0, 7.0]},
    }
    assert [loop.alternations for loop in loops] == [2, 2]


def steps_that_take(spent):
    return {
        "lower": [2 * spent] * 2, "lower steps": [spent] * 4, "upper": [spent] * 2, "upper steps": [spent] * 2,
    }  # fmt: skip


def taking(function, now, spent):
    def taken(*args, **kwargs):
        now[0] += spent
        return function(*args, **kwargs)

    return taken


def test_the_watch_counts_reads_in_the_phase_where_they_happen():
    counts = []
    for reads in (0, 3):
        trainer = build_trainer(TINY.changed(lower_steps=2), build_model(TINY), CPU, solver="cg")
        trainer.compute_lower_loss = partial(loss_read_so_often, reads)
        watch = SynchronisationWatch(CPU)
        trainer.add_callback(watch)
        trainer.train()
        counts.append(watch.count)
    assert counts[1]["lower"] == counts[0]["lower"] + 2 * 3
    assert counts[1]["upper"] == counts[0]["upper"] + 3  # the curvature takes the lower loss once


def loss_read_so_often(reads, model, inputs):
    loss = model(**inputs).loss
    for _ in range(reads):
        float(loss.detach())
    return loss


def test_views_by_pillow_are_normalised_crops_that_keep_labels():
    images = benchmark_images(4, 24)
    pairs, singles = PillowViews(images, 16, two_views=True), PillowViews(images, 16, two_views=False)
    torch.manual_seed(3)
    pair, again = pairs[0]["pixel_values"], pairs[0]["pixel_values"]
    assert pair.shape == (2, 3, 16, 16)
    assert not torch.equal(pair, again)
    torch.manual_seed(3)
    assert torch.equal(pair, pairs[0]["pixel_values"])
    row = singles[1]
    assert row["pixel_values"].shape == (3, 16, 16)
    assert row["labels"] == images[1]["labels"]
    assert -2.2 < float(row["pixel_values"].min()) < float(row["pixel_values"].max()) < 2.7


def test_the_baseline_reads_by_workers_without_end():
    trainer = build_trainer(TINY, build_model(TINY), CPU)
    baseline = Baseline(trainer, trainer.model, workers=1)
    first, second = (next(baseline.batches(Stream.LOWER))["pixel_values"] for _ in range(2))
    baseline.close()
    assert first.shape == (6, 2, 3, 16, 16)
    assert not torch.equal(first, second)


def test_claims_hold_within_their_bounds():
    assert Claim("a", 1.2, at_least=0.85, at_most=1.15).holds is False
    assert Claim("a", 1.1, at_least=0.85, at_most=1.15).holds is True
    assert Claim("a", 1.0, at_least=1.3).holds is False
    assert Claim("a", 0.0, at_most=0).holds is True
    assert Claim("a", 1.0, at_least=0.85, at_most=1.15).bounds == ">= 0.85, <= 1.15"


def measured(residuals=(8e-3, 9e-3), statuses=(SolveStatus.CONVERGED,) * 2) -> Measured:
    times = defaultdict(dict)
    times["baseline"] = {"lower": [2.0, 4.0], "upper": [8.0, 16.0], "unit": [1.0, 2.0], "waiting": [0.5, 1.0]}
    # Two steps a phase: the trainer's lower ones cost 1.1 times and its upper ones 1.03 times the bare loop's.
    times["bare loop"] = {
        "lower": [2.0, 4.0], "upper": [4.0, 8.0],
        "lower steps": [1.0, 1.0, 2.0, 2.0], "upper steps": [2.0, 2.0, 4.0, 4.0],
    }  # fmt: skip
    times["kept graph"] = {"upper": [6.18, 12.36]}
    times["recycled"] = {"lower": [2.0, 4.0], "upper": [2.0, 4.0]}
    times["trainer"] = {
        "lower": [2.0, 4.0], "upper": [4.12, 8.24], "waiting": [0.0, 0.0], "log": [0.0, 0.0],
        "lower steps": [0.5, 1.1, 2.2, 9.0], "upper steps": [2.06, 2.06, 4.12, 4.12],
    }  # fmt: skip
    parts = MeasuredParts([Part(UNIT, 4, [1.0]), Part("lower step", 4, [1.25])], bandwidth=1.0)
    values = {
        "baseline_equivalents": {"lower": 2.0, "upper": 8.5},
        "baseline_arithmetic": {"lower": 2.0, "upper": 6.0},
        "products": [5],
        "recycled_products": [6, 2],
        "residuals": list(residuals),
        "statuses": list(statuses),
        "damping": 10.0,
    }
    return Measured(parts, times, synchronisations={"lower": 0, "upper": 1}, **values)


def test_claims_are_ratios_of_the_same_round():
    claims = {claim.name: claim.value for claim in make_claims(measured(), CPU, products=5, upper_steps=8)}
    assert claims["baseline: its time over its own count of equivalents"] == pytest.approx(9.5 / 10.5)
    assert claims["the same by arithmetic alone"] == pytest.approx(9.5 / 8)
    assert claims["upper phase, same products: baseline / trainer"] == pytest.approx(8 / 4.12)
    assert claims["the same against the baseline with a kept graph"] == pytest.approx(1.5)
    assert claims["whole alternation: trainer / bare loop"] == pytest.approx((3 * 1.1 + 6 * 1.03) / 9)
    assert claims["upper phase, recycled solver at 1 %: baseline / ours"] == pytest.approx(4)
    assert claims["mean products of its solves"] == 4
    assert "lower step: images per second over those of a bare step" not in claims


def test_solves_that_do_not_reach_the_tolerance_are_no_gain():
    statuses = (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.CONVERGED)
    claims = {
        claim.name: claim for claim in make_claims(measured([1.7, 2.0], statuses), CPU, products=5, upper_steps=8)
    }
    assert not claims["upper phase, recycled solver at 1 %: baseline / ours"].holds
    why = claims["share of its solves that met negative curvature"]
    assert (why.value, why.holds) == (0.5, False)
    (held,) = [claim for claim in make_claims(measured(), CPU, products=5, upper_steps=8) if claim.name == why.name]
    assert (held.value, held.holds) == (0, True)


@pytest.mark.parametrize(("eigenvalue", "damping"), [(-101.0, 1000), (-9.0, 10)])
def test_the_damping_is_raised_while_a_system_is_indefinite(monkeypatch, eigenvalue, damping):
    """A loss with a curvature of -101 in some directions: of 10, 31.6, 100 and 316 the last is the first above it, and
    1000 is taken; with one of -9 the first is enough and stays."""
    model = build_model(TINY)
    trainer = build_trainer(TINY, model, CPU)
    loop = BareLoop(trainer, model, run._recycling(trainer.args, TINY))
    first = loop.theta_p[0]

    def curvature(batch):
        return lambda vector: tuple(eigenvalue * v if v.shape == first.shape else 0.0 * v for v in vector)

    monkeypatch.setattr(loop, "curvature", curvature)
    raise_damping(loop)
    assert loop.damping == pytest.approx(damping)
    assert trainer.args.damping != loop.damping
    assert loop.solves == []
    assert loop.alternations == 0


def test_a_short_phase_is_not_held_to_the_aim_of_a_whole_one():
    for steps, bound in ((7, None), (8, 2.2)):
        claims = {claim.name: claim for claim in make_claims(measured(), CPU, products=5, upper_steps=steps)}
        assert claims["upper phase, recycled solver at 1 %: baseline / ours"].at_least == bound


def test_a_gpu_has_targets_of_its_own():
    claims = {claim.name: claim for claim in make_claims(measured(), torch.device("cuda"), products=5, upper_steps=8)}
    assert claims["lower step: images per second over those of a bare step"].value == pytest.approx(0.8)
    assert not claims["waits for the device in the upper phase"].holds
    assert claims["whole alternation: baseline / trainer"].at_least == 8


@pytest.mark.slow
def test_the_quick_benchmark_runs_as_users_start_it(tmp_path, monkeypatch):
    smaller = WORKLOADS["quick"].changed(width=8, lower_batch=8, pretrain_steps=5, repeats=1)
    monkeypatch.setitem(WORKLOADS, "quick", smaller)
    benchmark.main(["--quick", "--use_cpu", "--output_dir", str(tmp_path)])
    for name in DEFAULT_STAGES:
        assert json.loads((tmp_path / f"{name}.json").read_text())["workload"]["width"] == 8
