"""The trainer against the algorithm written down once more (see restatement.py)."""

from functools import cache

import pytest
import torch

from bissl_hf import BiSSLTrainer, BiSSLTrainingArguments

from ..conftest import TinyImages, tiny_model
from .restatement import Settings, run


def train(settings: Settings, model, train_data, pretext_data, output_dir, **overrides) -> BiSSLTrainer:
    s = settings
    arguments = {
        "num_alternations": s.alternations,
        "lower_steps": s.lower_steps,
        "upper_steps": s.upper_steps,
        "head_warmup_epochs": s.warmup_epochs,
        "per_device_lower_batch_size": s.lower_batch,
        "per_device_train_batch_size": s.upper_batch,
        "curvature_batch_size": s.curvature_batch,
        "proximal_weight": s.proximal_weight,
        "damping": s.damping,
        "direct_weight": s.direct_weight,
        "lower_learning_rate": s.lower_lr,
        "learning_rate": s.upper_lr,
        "lower_weight_decay": s.lower_decay,
        "weight_decay": s.upper_decay,
        "lower_momentum": s.momentum,
        "lower_warmup_steps": s.lower_warmup,
        "warmup_steps": s.upper_warmup,
        "lower_max_grad_norm": s.lower_clip,
        "max_grad_norm": s.upper_clip,
        "lower_optim": s.lower_optim,
        "seed": s.seed,
        "solver_max_iterations": 60,
        "solver_tolerance": 1e-13,
    }
    args = BiSSLTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no",
        **{**arguments, **overrides},
    )  # fmt: skip
    trainer = BiSSLTrainer(model, args, train_dataset=train_data, lower_dataset=pretext_data)
    trainer.train()
    return trainer


def largest_difference(first, second) -> float:
    states = first.state_dict(), second.state_dict()
    assert list(states[0]) == list(states[1])
    return max(float((states[0][name] - states[1][name]).abs().max()) for name in states[0])


@cache
def restated(settings: Settings):
    """The result of the restatement, which takes most of the time of these tests."""
    return run(tiny_model().double(), *data(), settings)


def data():
    return TinyImages(11, dtype=torch.float64), TinyImages(30, pairs=True, dtype=torch.float64)


def check_against_restatement(settings: Settings, tmp_path, **overrides) -> None:
    lower, upper, figures = restated(settings)
    assert figures["smallest eigenvalue"] > 0, "conjugate gradient and the dense solve need a definite system"
    assert figures["effect of the curvature"] > 0.01, "the curvature must matter in this test"
    model = tiny_model().double()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(settings, model, *data(), tmp_path, **overrides).model
    assert max(float((trained.state_dict()[name] - start[name]).abs().max()) for name in start) > 1e-3
    assert largest_difference(trained.lower, lower) < 1e-8
    assert largest_difference(trained.upper, upper) < 1e-8


@pytest.mark.parametrize(
    ("settings", "curvature_mode"),
    [(Settings(), "cached"), (Settings(lower_optim="lars", lower_lr=2.0, damping=3000.0), "recompute")],
    ids=["sgd-cached", "lars-recompute"],
)
def test_the_trainer_follows_the_algorithm(tmp_path, settings, curvature_mode):
    check_against_restatement(settings, tmp_path, curvature_mode=curvature_mode)


def test_the_trainer_follows_the_algorithm_with_recycled_directions(tmp_path):
    check_against_restatement(Settings(), tmp_path, solver="recycled")


def test_the_trainer_follows_the_algorithm_without_the_direct_gradient(tmp_path):
    check_against_restatement(Settings(direct_weight=0.0), tmp_path)


def test_upper_micro_batches_change_nothing_in_a_model_without_batch_statistics(tmp_path):
    """The right-hand side is linear in the rows, so parts add up to it and one solve suffices."""
    settings = Settings(upper_batch=6)
    results = []
    for part in (None, 2):
        model = tiny_model().double()
        for module in model.upper.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.forward = lambda x: x  # the statistics of a part differ from those of the batch
        results.append(
            train(
                settings, model, TinyImages(12, dtype=torch.float64), TinyImages(30, pairs=True, dtype=torch.float64),
                tmp_path, upper_micro_batch_size=part,
            ).model
        )  # fmt: skip
    assert largest_difference(*results) < 1e-11
