"""The trainer of both levels: what each step may move, what is logged, evaluated, and refused."""

import copy
import math
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    TrainerCallback,
)

from bissl_hf import BiSSLModel, BiSSLTrainer
from bissl_hf.evaluation.metrics import classification_metrics
from bissl_hf.trainer.divergence import DivergenceError

from ..conftest import TinyImages, tiny_model
from .restatement import CURVATURE, LOWER, UPPER, backbone_of, rate, read, with_copied_buffers
from .trainers import (
    TinyText,
    all_equal,
    everything_of_both_levels,
    flat_norm,
    make_args,
    make_text_trainer,
    make_trainer,
    minus,
    pad,
    recorded,
    same_tensors,
    snapshot,
    training_logs,
)

# What a step may move


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"direct_weight": 0.0},
        {"lower_optim": "lars", "lower_weight_decay": 0.01, "weight_decay": 0.1},
        {"solver": "identity"},
        {"solver": "blockwise_cg"},
        {"solver": "recycled"},
        {"curvature_mode": "recompute", "upper_micro_batch_size": 3, "lower_micro_batch_size": 4},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_a_step_moves_its_own_level_only(tmp_path, settings):
    """Parameters, momenta and running statistics of the other level stay as they are, to the last bit."""
    parts = 1 if "upper_micro_batch_size" not in settings else 2
    _, steps = recorded(everything_of_both_levels, tmp_path, **settings)
    assert [level for level, _, _ in steps] == ["lower", "lower", "lower", "upper", "upper"] * 2
    for number, (level, before, after) in enumerate(steps):
        other = "upper" if level == "lower" else "lower"
        for kept, now in zip(before[other], after[other], strict=True):
            assert len(kept) == len(now)
            assert all_equal(kept, now), (number, level)
        parameters, momentum, buffers = zip(before[level], after[level], strict=True)
        assert not any(torch.equal(*pair) for pair in zip(*parameters, strict=True) if pair[0].ndim > 1)
        assert len(momentum[0]) != len(momentum[1]) or not all_equal(*momentum)
        moved = [now - then for then, now in zip(*buffers, strict=True) if then.dtype == torch.long]
        # The lower model sees each view apart; the upper one runs once on each part of its batch.
        expected = (2 if "lower_micro_batch_size" not in settings else 4) if level == "lower" else parts
        assert [int(count) for count in moved] == [expected] * len(moved)
        assert len(moved) > 0
        means = [pair for pair in zip(*buffers, strict=True) if pair[0].dtype != torch.long]
        assert not any(torch.equal(*pair) for pair in means)


def test_the_head_warm_up_trains_the_head_alone_and_once(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                seen.append(copy.deepcopy(model))

    trainer = make_trainer(tmp_path, head_warmup_epochs=3, callbacks=[Watch()])
    start = copy.deepcopy(trainer.model)
    trainer.train()
    (warm,) = seen
    assert same_tensors(start.lower.state_dict(), warm.lower.state_dict())
    assert all_equal(start.backbone_parameters("upper"), warm.backbone_parameters("upper"))
    heads = zip(start.head_parameters("upper"), warm.head_parameters("upper"), strict=True)
    assert not any(torch.equal(*pair) for pair in heads)
    counts = [int(b) for b in warm.upper.buffers() if b.dtype == torch.long]
    assert counts
    assert set(counts) == {3 * 2}, "the backbone stays in train mode: 3 passes of 12 // 5 batches"
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())
    head = snapshot(trainer.model.head_parameters("upper"))
    trainer.warm_up_head()
    assert all_equal(head, trainer.model.head_parameters("upper"))


def test_without_head_warm_up_the_first_step_finds_the_model_as_given(tmp_path):
    trainer = make_trainer(tmp_path, head_warmup_epochs=0)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.warm_up_head()
    assert same_tensors(start, trainer.model.state_dict())


def test_upper_adaptation_moves_theta_d_at_the_start_of_every_so_many_alternations(tmp_path):
    def backbones(trainer):
        return snapshot(trainer.model.backbone_parameters("lower")), snapshot(
            trainer.model.backbone_parameters("upper")
        )

    _, steps = recorded(
        backbones, tmp_path, num_alternations=5, upper_adaptation_every=2, upper_adaptation_strength=0.25
    )
    for number, (level, (theta_p, theta_d), (_, after)) in enumerate(steps):
        alternation, place = divmod(number, 5)
        if alternation in (2, 4) and place == 0:
            expected = [d + 0.25 * (p - d) for p, d in zip(theta_p, theta_d, strict=True)]
            for found, wanted in zip(after, expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
            assert not all_equal(theta_d, after)
        elif level == "lower":
            assert all_equal(theta_d, after), number


# Figures

FIGURES = {
    "lower/loss", "lower/proximal", "upper/loss", "upper/direct_loss", "lower/gradient_norm", "upper/gradient_norm",
    "solver/iterations", "solver/residual", "solver/cosine", "levels/pull", "levels/distance", "levels/moved",
    "alignment/cosine",
    "lower/learning_rate", "upper/learning_rate", "samples_per_second", "loss", "learning_rate", "epoch",
}  # fmt: skip


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def flatten(tensors) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def aligned_loss(model, batch):
    """The downstream loss at (theta_P, phi_D), with the batch statistics of the batch."""
    prefix = f"{model.upper.base_model_prefix}."
    named = {prefix + name: value for name, value in model.lower.base_model.named_parameters()}
    return with_copied_buffers(model.upper, batch, named)


def expected_figures(steps, alternation, settings) -> dict[str, float]:
    """The figures of one alternation, from the models before and after each of its steps."""
    images, pairs = TinyImages(12, dtype=torch.float64), TinyImages(24, pairs=True, dtype=torch.float64)
    own = steps[alternation * 5 : alternation * 5 + 5]
    found: dict[str, list[float]] = {}

    def note(name, value):
        found.setdefault(name, []).append(float(value))

    for step, (_, before, after) in enumerate(own[:3]):
        position = alternation * 3 + step
        theta_p, theta_d = backbone_of(before.lower), backbone_of(before.upper)
        note("lower/loss", with_copied_buffers(before.lower, read(pairs, 8, position, 7, LOWER)).detach())
        note("lower/proximal", 0.5 * settings["proximal_weight"] * flat_norm(minus(theta_p, theta_d)) ** 2)
        moved = minus(after.lower.parameters(), before.lower.parameters())
        note("lower/gradient_norm", flat_norm(moved) / (0.05 * rate(position, 6, 0, 0.001)))
    lower, curvature = own[3][1].lower, read(pairs, 8, alternation, 7, CURVATURE)
    theta_p = backbone_of(lower)
    gradient = torch.autograd.grad(with_copied_buffers(lower, curvature), theta_p, create_graph=True)
    pretext = flatten(gradient).detach()
    for step, (_, before, after) in enumerate(own[3:]):
        position = alternation * 2 + step
        batch = read(images, 5, position, 7, UPPER)
        loss = aligned_loss(before, batch)
        rhs = flatten(torch.autograd.grad(loss, backbone_of(before.lower)))
        note("upper/loss", loss.detach())
        note("upper/direct_loss", with_copied_buffers(before.upper, batch).detach())
        note("alignment/cosine", pretext @ rhs / pretext.norm() / rhs.norm())
        lr = 0.02 * rate(position, 4, 0, 0.001)
        note("upper/gradient_norm", flat_norm(minus(after.upper.parameters(), before.upper.parameters())) / lr)
        solution = [-part / lr for part in minus(backbone_of(after.upper), backbone_of(before.upper))]
        curved = flatten(torch.autograd.grad(gradient, theta_p, solution, retain_graph=True))
        product = flatten(solution) + curved / (settings["proximal_weight"] + settings["damping"])
        note("solver/residual", (rhs - product).norm() / rhs.norm())
        note("solver/cosine", flatten(solution) @ rhs / flat_norm(solution) / rhs.norm())
    return {name: mean(values) for name, values in found.items()}


def test_every_figure_is_logged_and_right(tmp_path):
    """SGD without momentum, decay and clipping, so that gradients can be read off the steps."""
    settings = {"proximal_weight": 0.3, "damping": 600.0}
    plain = {"lower_momentum": 0.0, "optim_args": "momentum=0.0", "weight_decay": 0.0, "lower_weight_decay": 0.0}
    trainer, steps = recorded(
        lambda trainer: copy.deepcopy(trainer.model).train(), tmp_path, dtype=torch.float64, direct_weight=0.0,
        max_grad_norm=0.0, lower_max_grad_norm=0.0, solver_max_iterations=2, **settings, **plain,
    )  # fmt: skip
    logs = training_logs(trainer)
    assert len(logs) == 2
    start = snapshot(backbone_of(steps[0][1].lower))
    for alternation, log in enumerate(logs):
        assert set(log) >= FIGURES
        expected = expected_figures(steps, alternation, settings)
        assert 1e-6 < expected["solver/residual"] < 1, "the residual must be one that can be seen"
        end = steps[alternation * 5 + 4][2]
        theta_p, theta_d = backbone_of(end.lower), backbone_of(end.upper)
        expected["levels/distance"] = flat_norm(minus(theta_p, theta_d)) / flat_norm(theta_p)
        expected["levels/moved"] = flat_norm(minus(theta_p, start)) / flat_norm(theta_p)
        expected["levels/pull"] = 0.3 * sum(0.05 * rate(step, 6, 0, 0.001) for step in range(3 * (alternation + 1)))
        expected["lower/learning_rate"] = 0.05 * rate(3 * (alternation + 1), 6, 0, 0.001)
        expected["upper/learning_rate"] = 0.02 * rate(2 * (alternation + 1), 4, 0, 0.001)
        expected["solver/iterations"] = 2
        expected["loss"] = mean([expected["lower/loss"]] * 3 + [expected["upper/loss"]] * 2)
        expected["epoch"] = alternation + 1
        for name, value in expected.items():
            assert log[name] == pytest.approx(value, rel=1e-5), name
        assert log["samples_per_second"] > 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_pull_of_sgd_counts_momentum(tmp_path, momentum):
    trainer = make_trainer(tmp_path, lower_momentum=momentum, lower_max_grad_norm=0.0)
    estimate = trainer.estimate_pull()
    trainer.train()
    rates = sum(0.05 * rate(step, 6, 0, 0.001) for step in range(6))
    assert training_logs(trainer)[-1]["levels/pull"] == pytest.approx(20.0 * rates / (1 - momentum), rel=1e-5)
    assert estimate == pytest.approx(20.0 * rates / (1 - momentum), rel=1e-5)


def test_gradients_are_clipped_to_their_own_levels_bound(tmp_path):
    """A bound that is met makes the step of plain SGD lr * bound long."""
    _, steps = recorded(
        lambda trainer: {level: snapshot(getattr(trainer.model, level).parameters()) for level in ("lower", "upper")},
        tmp_path, lower_momentum=0.0, optim_args="momentum=0.0", weight_decay=0.0, lower_weight_decay=0.0,
        lower_max_grad_norm=1e-2, max_grad_norm=1e-3, lower_lr_scheduler_type="constant",
        lr_scheduler_type="constant", dtype=torch.float64,
    )  # fmt: skip
    for level, before, after in steps:
        expected = 0.05 * 1e-2 if level == "lower" else 0.02 * 1e-3
        assert flat_norm(minus(after[level], before[level])) == pytest.approx(expected, rel=1e-2)


def test_solves_that_end_badly_are_counted(tmp_path):
    """A lower loss that is concave in theta_P makes the first direction one of negative curvature."""

    class Concave(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            return -1e4 * sum((parameter**2).sum() for parameter in self.model.backbone_parameters("lower"))

    trainer = make_trainer(tmp_path, cls=Concave, lower_learning_rate=1e-9, proximal_weight=0.1, damping=0.1)
    trainer.train()
    assert [log["solver/negative_curvature"] for log in training_logs(trainer)] == [1.0, 1.0]


def test_no_solver_figures_without_a_solve(tmp_path):
    trainer = make_trainer(tmp_path, solver="identity")
    trainer.train()
    assert not [name for log in training_logs(trainer) for name in log if name.startswith("solver/")]


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    class Diverging(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            return super().compute_lower_loss(model, inputs) * float("inf")

    trainer = make_trainer(tmp_path, cls=Diverging)
    with pytest.raises(DivergenceError, match=r"diverged in lower step 1 of alternation 1 .*the loss is not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_trackers_get_the_figures(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_trainer(tmp_path, report_to="tensorboard").train()
    (event_file,) = (tmp_path / "events").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(event_file)).Reload()
    tags = events.Tags()["scalars"]
    assert {f"train/{name}" for name in FIGURES - {"epoch"}} <= set(tags)
    assert [event.step for event in events.Scalars("train/levels/pull")] == [5, 10]


# The pull and the sizes of batches


def messages(caplog, part) -> list[str]:
    return [record.getMessage() for record in caplog.records if part in record.getMessage()]


def model_without_zeros() -> BiSSLModel:
    """LARS takes whole steps on a tensor that is all zeros, as biases are in a new model."""
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.lower.parameters():
            parameter.add_(0.05 * torch.rand(parameter.shape, generator=generator))
    model.start_upper_from_lower()
    return model


@pytest.mark.parametrize("optim", ["sgd", "lars"])
def test_a_weak_pull_is_warned_of_with_a_value_that_gives_three(tmp_path, caplog, optim):
    settings = {"lower_optim": optim, "num_alternations": 1, "lower_max_grad_norm": 0.0}
    make_trainer(tmp_path, model=model_without_zeros(), proximal_weight=1e-3, **settings).train()
    (message,) = messages(caplog, "will hardly feel")
    suggested = float(message.split("proximal_weight=")[1].split()[0])
    caplog.clear()
    trainer = make_trainer(tmp_path, model=model_without_zeros(), proximal_weight=suggested, **settings)
    assert trainer.estimate_pull() == pytest.approx(3, rel=0.05)
    trainer.train()
    assert messages(caplog, "will hardly feel") == []
    # The trust ratio of LARS follows the gradient of each step: its estimate tells the order of magnitude.
    factor = 1.05 if optim == "sgd" else 3
    assert 3 / factor < training_logs(trainer)[-1]["levels/pull"] < 3 * factor


def test_the_pull_of_lars_counts_the_trust_ratio(tmp_path):
    """Of the first step, whose gradient is that of the first batch: theta_P is theta_D then."""
    model = model_without_zeros()
    trainer = make_trainer(
        tmp_path, model=model, lower_optim="lars", lower_weight_decay=0.02, lower_max_grad_norm=0.0,
        logging_strategy="steps", logging_steps=1, num_alternations=1, head_warmup_epochs=0,
    )  # fmt: skip
    lower = copy.deepcopy(model.lower).train()
    parameters = backbone_of(lower)
    loss = with_copied_buffers(lower, read(TinyImages(24, pairs=True), 8, 0, 7, LOWER))
    ratios = [
        (p.numel(), 0.001 * float(p.detach().norm()) / float((g + 0.02 * p.detach()).norm()))
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True)
    ]
    length = math.exp(sum(size * math.log(ratio) for size, ratio in ratios) / sum(size for size, _ in ratios))
    trainer.train()
    assert training_logs(trainer)[0]["levels/pull"] == pytest.approx(20.0 * 0.05 * length / (1 - 0.9), rel=1e-3)


def test_the_pull_of_lars_is_estimated_for_a_new_model_with_zero_biases(tmp_path):
    trainer = make_trainer(tmp_path, lower_optim="lars", num_alternations=4, lower_max_grad_norm=0.0)
    estimate = trainer.estimate_pull()
    trainer.train()
    assert training_logs(trainer)[-1]["levels/pull"] == pytest.approx(estimate, rel=0.5)


def test_the_estimate_of_the_pull_changes_nothing(tmp_path):
    trainer = make_trainer(tmp_path)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    trainer.estimate_pull()
    assert same_tensors(start, trainer.model.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_an_upper_batch_above_the_labelled_set_is_cut_with_one_warning(tmp_path, caplog):
    trainer = make_trainer(tmp_path, train_rows=4, per_device_train_batch_size=256)
    trainer.train()
    (message,) = messages(caplog, "labelled batch")
    assert "The labelled batch of 256" in message
    assert "larger than the 4 labelled examples; it is cut to 4." in message
    assert trainer.state.global_step == 10
    assert math.isfinite(training_logs(trainer)[-1]["upper/loss"])


def counting_collator(sizes):
    def collate(rows):
        sizes.append(len(rows))
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}

    return collate


@pytest.mark.parametrize(("given", "expected"), [(None, [8] * 9), (6, [6] * 2 + [8] * 7), (20, [8] * 7 + [20] * 2)])
def test_the_curvature_batch_is_read_once_per_alternation(tmp_path, given, expected):
    sizes: list[int] = []
    keywords = {"lower_data_collator": counting_collator(sizes)}
    make_trainer(tmp_path, keywords=keywords, curvature_batch_size=given).train()
    # 2 alternations of 3 lower batches, the first of them once more for the estimate of the pull.
    assert sorted(sizes) == expected


# Other pairs of tasks


def test_a_subclass_may_replace_both_losses(tmp_path):
    calls: dict[str, list] = {"lower": [], "upper": []}

    class Own(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            assert set(inputs) == {"pixel_values"}
            calls["lower"].append(model)
            return (model(**inputs).embeddings ** 2).mean()

        def compute_upper_loss(self, model, inputs):
            logits = model(pixel_values=inputs["pixel_values"]).logits
            calls["upper"].append(logits.detach())
            return 3 * torch.nn.functional.cross_entropy(logits, inputs["labels"])

    trainer = make_trainer(tmp_path, cls=Own, head_warmup_epochs=0)
    trainer.train()
    assert len(calls["lower"]) == 6 + 2 + 1
    assert len(calls["upper"]) == 2 * 4, "at theta_P and at theta_D in each upper step"
    assert all(not torch.equal(*pair) for pair in zip(calls["upper"][::2], calls["upper"][1::2], strict=True))
    assert training_logs(trainer)[0]["upper/loss"] > 2


def test_lower_micro_batches_add_up_for_a_mean_over_rows(tmp_path):
    class MeanOverRows(BiSSLTrainer):
        def compute_lower_loss(self, model, inputs):
            return (model(**inputs).embeddings ** 2).mean()

    states = []
    for part in (None, 3):
        model = tiny_model().double()
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.forward = lambda x: x  # the statistics of a part differ from those of the batch
        trainer = make_trainer(
            tmp_path, model=model, cls=MeanOverRows, dtype=torch.float64, lower_micro_batch_size=part
        )
        start = snapshot(model.parameters())
        trainer.train()
        assert flat_norm(minus(model.parameters(), start)) > 1e-3
        states.append((snapshot(model.parameters()), training_logs(trainer)[-1]))
    (whole, whole_log), (split, split_log) = states
    assert max(float((one - other).abs().max()) for one, other in zip(whole, split, strict=True)) < 1e-11
    for name in ("lower/loss", "alignment/cosine", "lower/gradient_norm", "solver/residual"):
        assert split_log[name] == pytest.approx(whole_log[name], rel=1e-6, abs=1e-12), name


def test_a_pair_of_language_models_goes_through_the_same_trainer(tmp_path):
    trainer = make_text_trainer(tmp_path / "run", evaluate=True)
    model = trainer.model
    tied = model.lower.get_output_embeddings().weight
    assert tied is model.lower.get_input_embeddings().weight
    assert not any(parameter is tied for parameter in model.head_parameters("lower"))
    assert model.upper.config._attn_implementation == "sdpa"
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert model.lower.get_output_embeddings().weight is model.lower.get_input_embeddings().weight
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert any("pooler" in name for name in moved)
    assert any(name.startswith("lower.cls") for name in moved)
    for log in training_logs(trainer):
        assert all(math.isfinite(log[name]) for name in FIGURES)
    trainer.model.export(tmp_path / "aligned")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "aligned")
    assert type(exported) is BertForSequenceClassification
    batch = pad([TinyText(12, labels=True)[index] for index in range(5)])
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        torch.testing.assert_close(exported(**batch).logits, expected)
        assert not torch.allclose(trainer.model.upper(**batch).logits, expected)


@pytest.mark.parametrize("make", [make_trainer, make_text_trainer])
def test_bf16_runs_on_a_cpu(tmp_path, make):
    trainer = make(tmp_path, bf16=True)
    trainer.train()
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())
    last = training_logs(trainer)[-1]
    assert all(math.isfinite(last[name]) for name in FIGURES)
    plain = make(tmp_path)
    plain.train()
    assert last["lower/loss"] == pytest.approx(training_logs(plain)[-1]["lower/loss"], rel=0.1)
    assert last["lower/loss"] != training_logs(plain)[-1]["lower/loss"]


# Evaluation


def native_aligned(model) -> torch.nn.Module:
    """The upper model with theta_P and its statistics, put together by name."""
    upper = copy.deepcopy(model.upper).eval()
    missing = upper.base_model.load_state_dict(model.lower.base_model.state_dict(), strict=True)
    assert not missing.missing_keys
    return upper


def loss_and_accuracy(model, rows) -> tuple[float, float]:
    dataset = TinyImages(rows, seed=5)
    labels = torch.tensor([dataset[index]["labels"] for index in range(rows)])
    with torch.no_grad():
        logits = model(pixel_values=dataset.images).logits
    loss = torch.nn.functional.cross_entropy(logits, labels)
    return float(loss), float((logits.argmax(-1) == labels).float().mean())


def recalibrated(model, batches) -> torch.nn.Module:
    """Sets batch-norm statistics to the means over batches of what each of them has."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(pixel_values=batch["pixel_values"])
    return model.eval()


@pytest.mark.parametrize("images", [0, 8, 1024])
def test_evaluate_reports_the_aligned_and_the_upper_model(tmp_path, images):
    keywords = {"compute_metrics": classification_metrics()}
    trainer = make_trainer(tmp_path, eval_rows=10, keywords=keywords, bn_recalibration_images=images)
    trainer.train()
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.evaluate()
    assert same_tensors(before, trainer.model.state_dict())
    aligned = native_aligned(trainer.model)
    if images:
        total = min(images, 12)
        aligned = recalibrated(aligned, [read(TinyImages(12), 4, place, 7, 4) for place in range(total // 4)])
    for prefix, model in (("eval", aligned), ("eval_upper", trainer.model.upper.eval())):
        loss, accuracy = loss_and_accuracy(model, 10)
        assert metrics[f"{prefix}_loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics[f"{prefix}_accuracy"] == pytest.approx(accuracy)
    assert metrics["eval_loss"] != metrics["eval_upper_loss"]


def test_predictions_are_the_aligned_models(tmp_path):
    trainer = make_trainer(tmp_path, bn_recalibration_images=0)
    trainer.train()
    output = trainer.predict(TinyImages(10, seed=5))
    with torch.no_grad():
        expected = native_aligned(trainer.model)(pixel_values=TinyImages(10, seed=5).images).logits
    torch.testing.assert_close(torch.from_numpy(output.predictions), expected, rtol=1e-4, atol=1e-5)
    assert not [name for name in output.metrics if "upper" in name]
    assert "test_loss" in output.metrics


def test_the_evaluation_transform_is_used(tmp_path):
    def darken(inputs, key):
        return {**inputs, "pixel_values": inputs["pixel_values"] * 0}

    trainer = make_trainer(tmp_path, bn_recalibration_images=0, keywords={"eval_transform": darken})
    logits = torch.from_numpy(trainer.predict(TinyImages(10)).predictions)
    assert torch.equal(logits, logits[:1].expand_as(logits))


def test_evaluation_does_not_change_the_run(tmp_path):
    """With dropout, where a moved random state would show."""
    trainers = []
    for evaluate in (False, True):
        trainer = make_text_trainer(tmp_path, evaluate=evaluate, eval_strategy="steps", eval_steps=1)
        trainer.train()
        trainers.append(trainer)
    assert len([log for log in trainers[1].state.log_history if "eval_loss" in log]) == 10
    assert same_tensors(trainers[0].model.state_dict(), trainers[1].model.state_dict())


def scripted_scores(scores):
    """Scores of the aligned model one after another; the upper model, evaluated second, gets 100."""
    answers = iter([value for score in scores for value in (score, 100.0)])
    return {"compute_metrics": lambda prediction: {"score": next(answers)}}


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer, steps = recorded(
        lambda trainer: {name: value.clone() for name, value in trainer.model.state_dict().items()},
        tmp_path, num_alternations=4, eval_rows=6, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, save_total_limit=1,
        keywords=scripted_scores([1.0, 3.0, 2.0, 2.5]),
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")
    assert trainer.state.best_metric == 3.0
    assert same_tensors(trainer.model.state_dict(), steps[9][2])
    assert not same_tensors(trainer.model.state_dict(), steps[19][2])
    assert (tmp_path / "checkpoint-10" / "model.safetensors").is_file()


def test_the_best_checkpoint_is_remembered_over_a_resume(tmp_path):
    settings = {
        "num_alternations": 3, "eval_rows": 6, "save_strategy": "epoch", "load_best_model_at_end": True,
        "metric_for_best_model": "score", "greater_is_better": True, "save_total_limit": 3,
    }  # fmt: skip
    make_trainer(tmp_path / "there", keywords=scripted_scores([3.0, 2.0, 1.0]), **settings).train()
    here = (tmp_path / "there").rename(tmp_path / "here")
    resumed = make_trainer(here, keywords=scripted_scores([1.0]), **settings)
    resumed.train(resume_from_checkpoint=str(here / "checkpoint-10"))
    assert resumed.state.best_model_checkpoint == str(here / "checkpoint-5")
    best = BiSSLModel.from_pretrained(here / "checkpoint-5")
    assert same_tensors(resumed.model.state_dict(), best.state_dict())
    shutil.rmtree(here / "checkpoint-5")
    message = r"checkpoint-5 is the best .* load_best_model_at_end needs it .* not a folder. Put it there, or set"
    with pytest.raises(ValueError, match=message):
        resumed.check_checkpoint(here / "checkpoint-15")
    resumed.args.load_best_model_at_end = False
    resumed.check_checkpoint(here / "checkpoint-15")


def test_training_stops_early_when_asked_to(tmp_path):
    trainer = make_trainer(
        tmp_path, num_alternations=6, eval_rows=6, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="score", greater_is_better=True, callbacks=[EarlyStoppingCallback(1)],
        keywords=scripted_scores([1.0, 3.0, 2.0]),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 15
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")


# What is refused


def test_another_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"model is a Linear; it must be a BiSSLModel \(see BiSSLModel.from_models\)"):
        BiSSLTrainer(torch.nn.Linear(1, 1), make_args(tmp_path))


REFUSED = [
    ({"train_rows": None}, "train_dataset is missing; it is needed"),
    ({"lower_rows": None}, "lower_dataset is missing; it is needed"),
    ({"train_rows": 0}, "train_dataset is empty; it is needed"),
    ({"lower_rows": 0}, "lower_dataset is empty; it is needed"),
    ({"lower_rows": 7}, "per_device_lower_batch_size makes a batch of 8, and lower_dataset has 7 examples"),
    ({"curvature_batch_size": 25}, "curvature_batch_size makes a batch of 25, and lower_dataset has 24 examples"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_data_that_does_not_suffice_is_refused_before_training(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **settings)


def test_without_any_data_a_trainer_evaluates_but_does_not_train(tmp_path):
    trainer = make_trainer(tmp_path, train_rows=None, lower_rows=None)
    assert "eval_upper_loss" in trainer.evaluate(TinyImages(5))
    with pytest.raises(ValueError, match="train_dataset and lower_dataset are missing; both levels need data"):
        trainer.train()


def test_optimizer_options_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"SGD \(from lower_optim='sgd'\) does not take trust_coefficient"):
        make_trainer(tmp_path, lower_optim_args="trust_coefficient=0.1").create_optimizer()
