"""Whole runs on two and four processes against one process on the same global batches."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.distributed import rank, world_size
from bissl_hf.models.batch_norm import batch_norm_modules, running_statistics

from ..conftest import NUM_LABELS, TinyImages, tiny_model
from ..processes import run_in_processes
from .restatement import LOWER, UPPER, read
from .trainers import make_trainer, same_tensors

LOWER_STEPS, UPPER_STEPS, PRODUCTS = 3, 2, 2
LOWER_BATCH, UPPER_BATCH, EMBEDDING = 8, 4, 5


def layer_norm_model(seed: int) -> BiSSLModel:
    """A ViT with a linear projection: nothing in it looks at other rows."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, num_labels=NUM_LABELS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=(EMBEDDING,)))
    return BiSSLModel.from_models(lower, ViTForImageClassification(config))


def build(folder: Path, model: BiSSLModel, **changes: Any) -> Any:
    """A trainer in float64 whose global batches do not depend on the number of processes."""
    return make_trainer(
        folder, model=model.double(), dtype=torch.float64, **{
            "num_alternations": 3, "lower_steps": LOWER_STEPS, "upper_steps": UPPER_STEPS, "eval_rows": 10,
            "per_device_lower_batch_size": LOWER_BATCH // world_size(), "solver_max_iterations": PRODUCTS,
            "per_device_train_batch_size": UPPER_BATCH // world_size(), "proximal_weight": 2.0, "damping": 20.0,
            **changes,
        },
    )  # fmt: skip


def logged(trainer: Any) -> list[dict[str, float]]:
    """Every figure of a run but those of time."""
    rows = [{name: value for name, value in row.items() if not re.search("runtime|_per_second|_time$", name)}
            for row in trainer.state.log_history]  # fmt: skip
    return [row for row in rows if "train_loss" not in row]


class CountExchanges(TrainerCallback):
    """Notes for the last lower and the upper steps of the second alternation what the first process exchanges: every
    operation that reaches the backend, and the sizes of the all-reduces that this package starts."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.sizes: list[int] = []
        self.profile: Any = None
        self.all_reduce = dist.all_reduce

    def noted(self, tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        self.sizes.append(tensor.numel())
        return self.all_reduce(tensor, *arguments, **keywords)

    def on_step_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        alternation, place = divmod(state.global_step, LOWER_STEPS + UPPER_STEPS)
        if rank() == 0 and alternation == 1 and place >= LOWER_STEPS - 1:
            self.sizes = []
            dist.all_reduce = self.noted
            self.profile = profile(activities=[ProfilerActivity.CPU])
            self.profile.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        if self.profile is not None:
            self.profile.__exit__(None, None, None)
            dist.all_reduce = self.all_reduce
            counts = {event.key: event.count for event in self.profile.key_averages() if "c10d::" in event.key}
            self.steps.append({"sizes": self.sizes, "operations": counts})
            self.profile = None


def exact_run(folder: Path, *, count: bool = False) -> dict[str, Any]:
    """A run of three alternations. Each process starts from weights of its own, which must not matter."""
    counter = CountExchanges()
    trainer = build(folder / "exact", layer_norm_model(rank()), callbacks=[counter] if count else None)
    trainer.train()
    small = trainer.predict(TinyImages(3, dtype=torch.float64, seed=3))
    optimizer = trainer.two_level_optimizer
    return {
        "world size": world_size(),
        "model": trainer.model.state_dict(),
        "optimizer": {
            name: [state["momentum_buffer"] for state in getattr(optimizer, name).state.values()]
            for name in ("lower", "upper")
        },
        "logs": logged(trainer),
        "small": {"logits": torch.from_numpy(small.predictions), "loss": small.metrics["test_loss"]},
        "exchanges": counter.steps,
        "wrapped": type(trainer.model_wrapped).__name__,
    }


def batch_norm_run(
    folder: Path, name: str, resume_from: str | None = None, *, evaluate_first: bool = False, **changes: Any
) -> dict[str, Any]:
    trainer = build(folder / name, tiny_model(), num_alternations=2, damping=600.0, **changes)
    if evaluate_first:
        trainer.warm_up_head()
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume_from)
    logs = [row for row in logged(trainer) if row["step"] > 0]
    return {"model": trainer.model.state_dict(), "logs": logs, "wrapped": type(trainer.model_wrapped).__name__}


def batch_norm_runs(folder: Path) -> dict[str, Any]:
    """An uninterrupted run, one that saves, one that evaluates first, and those that go on from checkpoints."""
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    runs = {"plain": batch_norm_run(folder, "plain"), "saving": batch_norm_run(folder, "saving", **saving)}
    runs["evaluated before"] = batch_norm_run(folder, "evaluated", evaluate_first=True)
    for step in (2, 4, 5):
        checkpoint = f"{folder}/saving/checkpoint-{step}"
        runs[f"resumed at {step}"] = batch_norm_run(folder, f"resumed-{step}", checkpoint, **saving)
    return runs


def statistics_after_steps(folder: Path) -> dict[str, Any]:
    """Running statistics of the lower model after one lower step and of the upper one after one upper step."""
    found: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **keywords: Any) -> None:
            level = "lower" if state.global_step == 1 else "upper"
            found[level] = [tensor.clone() for tensor in running_statistics(getattr(model, level))]

    trainer = build(
        folder / "statistics", tiny_model(), num_alternations=1, lower_steps=1, upper_steps=1, eval_rows=0,
        head_warmup_epochs=0, callbacks=[Look()],
    )  # fmt: skip
    trainer.train()
    return found


def run_with_an_idle_parameter(folder: Path) -> dict[str, Any]:
    model = tiny_model()
    model.lower.projection_head.register_parameter("idle", nn.Parameter(torch.ones(2)))
    trainer = build(folder / "idle", model, num_alternations=2, damping=600.0, eval_rows=0)
    trainer.train()
    idle = trainer.model.lower.projection_head.idle
    return {
        "idle": idle.detach(),
        "searched": trainer.model_wrapped.find_unused_parameters,
        "lower": trainer.model.lower.state_dict(),
    }


def refused_checkpoint(folder: Path) -> str:
    """What each process says about a checkpoint that is not whole."""
    checkpoint = folder / "saving" / "checkpoint-3"
    dist.barrier()
    if rank() == 0:
        (checkpoint / "optimizer.pt").write_bytes(b"cut")
    dist.barrier()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - matched in the test
        batch_norm_run(folder, "refused", str(checkpoint))
    return str(caught.value)


def in_process(folder: Path, parts: tuple[str, ...]) -> None:
    results: dict[str, Any] = {}
    if "exact" in parts:
        results["exact"] = exact_run(folder, count="count" in parts)
    if "batch norm" in parts:
        results["runs"] = batch_norm_runs(folder)
        results["statistics"] = statistics_after_steps(folder)
        results["idle"] = run_with_an_idle_parameter(folder)
        results["refused"] = refused_checkpoint(folder)
    torch.save({"world size": world_size(), **results}, folder / f"rank-{rank()}.pt")


def run(folder: Path, processes: int, parts: tuple[str, ...]) -> list[dict[str, Any]]:
    run_in_processes(in_process, processes, folder, parts)
    results = [torch.load(folder / f"rank-{number}.pt", weights_only=False) for number in range(processes)]
    assert [result["world size"] for result in results] == [processes] * processes
    return results


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return exact_run(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("two"), 2, ("exact", "count", "batch norm"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("four"), 4, ("exact",))


# A model without batch statistics: the number of processes changes nothing


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_a_run_is_that_of_one_process(processes: int, one: dict[str, Any], request: pytest.FixtureRequest) -> None:
    assert one["world size"] == 1
    for result in request.getfixturevalue({2: "two", 4: "four"}[processes]):
        found = result["exact"]
        assert found["world size"] == processes
        assert found["wrapped"] == "DistributedDataParallel"
        torch.testing.assert_close(found["model"], one["model"], rtol=0, atol=1e-9)
        torch.testing.assert_close(found["optimizer"], one["optimizer"], rtol=0, atol=1e-9)
        assert len(found["logs"]) == len(one["logs"]) == 6
        for row, expected in zip(found["logs"], one["logs"], strict=True):
            assert row == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_run_of_one_process_is_one_to_speak_of(one: dict[str, Any]) -> None:
    """Both levels move, the curvature matters, and the solves do not break down."""
    start = layer_norm_model(0).double().state_dict()
    moved = {name: float((one["model"][name] - start[name]).abs().max()) for name in start}
    assert min(max(moved[name] for name in moved if name.startswith(level)) for level in ("lower", "upper")) > 1e-2
    logs = [row for row in one["logs"] if "solver/residual" in row]
    assert all(1e-12 < row["solver/residual"] < 0.5 and row["solver/negative_curvature"] == 0 for row in logs)


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_all_processes_hold_the_same_bits(processes: int, request: pytest.FixtureRequest) -> None:
    first, *others = [result["exact"] for result in request.getfixturevalue({2: "two", 4: "four"}[processes])]
    for other in others:
        assert same_tensors(first["model"], other["model"])
        for level in ("lower", "upper"):
            assert all(map(torch.equal, first["optimizer"][level], other["optimizer"][level]))
        assert first["logs"] == other["logs"]


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 4])
def test_an_evaluation_of_fewer_rows_than_a_global_batch(
    processes: int, one: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """With four processes and three rows only the first process has rows of its own."""
    for result in request.getfixturevalue({2: "two", 4: "four"}[processes]):
        found = result["exact"]["small"]
        assert found["logits"].shape == (3, NUM_LABELS)
        torch.testing.assert_close(found["logits"], one["small"]["logits"], rtol=0, atol=1e-9)
        assert found["loss"] == pytest.approx(one["small"]["loss"], abs=1e-9)


@pytest.mark.distributed
def test_what_processes_exchange_in_a_step(two: list[dict[str, Any]]) -> None:
    """One flat all-reduce per product and one per upper gradient, beside those of the gather inside the loss, and the
    average of the pretext gradient once per alternation. The lower step adds the reducer of DDP."""
    model = layer_norm_model(0)
    theta = sum(parameter.numel() for parameter in model.backbone_parameters("upper"))
    phi = sum(parameter.numel() for parameter in model.head_parameters("upper"))
    gathered, upper_gradient = LOWER_BATCH * 2 * EMBEDDING, 2 * (theta + phi)

    lower, first, second = two[0]["exact"]["exchanges"]
    assert lower["sizes"] == [gathered]
    assert lower["operations"] == {"c10d::allgather_": 1, "c10d::allreduce_": 1 + 1}
    assert second["sizes"] == [upper_gradient, *[gathered, theta] * PRODUCTS], "the gradient comes before the solve"
    assert second["operations"] == {"c10d::allgather_": PRODUCTS, "c10d::allreduce_": 1 + 2 * PRODUCTS}
    # The linearisation gathers too; the pretext gradient is averaged for its cosine with the downstream one.
    assert sorted(first["sizes"]) == sorted([*second["sizes"], gathered, theta])
    assert first["operations"] == {"c10d::allgather_": PRODUCTS + 1, "c10d::allreduce_": 3 + 2 * PRODUCTS}


# Batch norm: statistics of a batch are each process's own, running ones are averaged


@pytest.mark.distributed
def test_running_statistics_are_averages_over_processes(two: list[dict[str, Any]]) -> None:
    expected = {level: [] for level in ("lower", "upper")}
    for number in range(2):
        model = tiny_model().double().train()
        half = slice(number * LOWER_BATCH // 2, (number + 1) * LOWER_BATCH // 2)
        pairs = read(TinyImages(24, pairs=True, dtype=torch.float64), LOWER_BATCH, 0, 7, LOWER)
        model.lower(pixel_values=pairs["pixel_values"][half])
        half = slice(number * UPPER_BATCH // 2, (number + 1) * UPPER_BATCH // 2)
        images = read(TinyImages(12, dtype=torch.float64), UPPER_BATCH, 0, 7, UPPER)
        model.upper(pixel_values=images["pixel_values"][half])
        for level, tensors in expected.items():
            tensors.append(running_statistics(getattr(model, level)))
    assert len(batch_norm_modules(model.lower)) > len(batch_norm_modules(model.upper)) > 0
    for result in two:
        for level, (first, second) in expected.items():
            averages = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
            torch.testing.assert_close(result["statistics"][level], averages, rtol=0, atol=1e-12)
            assert not torch.allclose(first[0], second[0], atol=1e-3)


@pytest.mark.distributed
def test_saving_evaluating_and_resuming_change_nothing_on_any_process(two: list[dict[str, Any]]) -> None:
    """To the bit, running statistics included, inside either phase and at its end. Figures that were half collected at
    the checkpoint are averaged over processes in another order."""
    expected = two[0]["runs"]["plain"]
    assert any("eval_upper_loss" in row for row in expected["logs"])
    for result in two:
        assert len(result["runs"]) == 6
        for name, found in result["runs"].items():
            assert found["wrapped"] == "DistributedDataParallel", name
            assert same_tensors(found["model"], expected["model"]), name
            for row, wanted in zip(found["logs"], expected["logs"], strict=True):
                assert row == pytest.approx(wanted, rel=1e-12), name


@pytest.mark.distributed
def test_a_checkpoint_that_is_not_whole_is_refused_on_every_process(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert re.search("checkpoint-3 is not whole: optimizer.pt has 3 bytes instead of", result["refused"])


@pytest.mark.distributed
def test_lower_parameters_without_a_gradient_are_searched_for_only_where_there_are_some(
    two: list[dict[str, Any]],
) -> None:
    for result in two:
        assert result["idle"]["searched"]
        assert torch.equal(result["idle"]["idle"], torch.ones(2, dtype=torch.float64))
        lower = {name: tensor for name, tensor in result["idle"]["lower"].items() if not name.endswith("idle")}
        expected = result["runs"]["plain"]["model"]
        assert all(torch.equal(tensor, expected[f"lower.{name}"]) for name, tensor in lower.items())
