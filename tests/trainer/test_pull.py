"""The pull that `target_pull` asks for is the pull of the run, and what theta_P does when theta_D moves."""

import math

import pytest
import torch

from bissl_hf import BiSSLModel, BiSSLTrainer

from ..conftest import TinyImages, tiny_model, vit_model
from .trainers import TinyText, make_args, mask_words, pad, text_model, training_logs

MODELS = {"resnet": tiny_model, "vit": vit_model, "bert": text_model}
LEARNING_RATES = {"lars": 1.0, "sgd": 0.01, "adamw": 1e-3}


def build_model(kind: str) -> BiSSLModel:
    """A model whose biases are not zero, as those of a pre-trained one: key biases, which have no gradient, too."""
    model, generator = MODELS[kind]().double(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.lower.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.start_upper_from_lower()
    return model


def build_trainer(
    folder, kind: str, optim: str, *, learning_rate: float, upper_rate: float = 2e-4, **overrides
) -> BiSSLTrainer:
    momentum = {} if optim == "adamw" else {"lower_momentum": 0.5}
    args = make_args(
        folder, proximal_weight=None, damping=1.0, solver="identity", lower_optim=optim, num_alternations=6,
        lower_steps=8, upper_steps=1, lower_learning_rate=learning_rate, learning_rate=upper_rate,
        **{**momentum, **overrides},
    )  # fmt: skip
    if kind == "bert":
        words = {"data_collator": pad, "lower_data_collator": pad, "lower_transform": mask_words}
        data = {"train_dataset": TinyText(12, labels=True), "lower_dataset": TinyText(64, labels=False), **words}
    else:
        labelled, pairs = (TinyImages(rows, pairs=rows > 12, dtype=torch.float64) for rows in (12, 64))
        data = {"train_dataset": labelled, "lower_dataset": pairs}
    return BiSSLTrainer(build_model(kind), args, **data)


@pytest.mark.parametrize("optim", LEARNING_RATES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_pull_of_a_run_is_its_target(tmp_path, kind, optim):
    trainer = build_trainer(tmp_path, kind, optim, learning_rate=LEARNING_RATES[optim], target_pull=10.0)
    trainer.train()
    assert 10 / 1.5 < training_logs(trainer)[-1]["levels/pull"] < 10 * 1.5


def ends_of_theta_p(folder, kind: str, optim: str, shift: float) -> tuple[list, list, float]:
    """Runs the lower level with theta_D fixed, moved by `shift` along a direction of signs. Steps are so short that
    theta_P moves by what it takes over from theta_D alone: its own curvature is another matter (the damping)."""
    trainer = build_trainer(
        folder, kind, optim, learning_rate=1e-2 * LEARNING_RATES[optim], target_pull=2.0, head_warmup_epochs=0,
        upper_rate=1e-30, weight_decay=0.0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    theta_d = trainer.model.backbone_parameters("upper")
    signs = [2.0 * torch.randint(0, 2, p.shape, generator=generator).double() - 1 for p in theta_d]
    with torch.no_grad():
        for parameter, sign in zip(theta_d, signs, strict=True):
            parameter.add_(shift * sign)
    trainer.train()
    ends = [p.detach().clone() for p in trainer.model.backbone_parameters("lower")]
    return ends, signs, training_logs(trainer)[-1]["levels/pull"]


@pytest.mark.slow
@pytest.mark.parametrize("optim", LEARNING_RATES)
@pytest.mark.parametrize("kind", MODELS)
def test_theta_p_takes_over_what_the_pull_says_of_a_move_of_theta_d(tmp_path, kind, optim):
    """1 - exp(-pull) of it, on average over the entries; none takes over less than nothing or more than all."""
    move = 1e-9
    (up, signs, pull), (down, _, _) = (
        ends_of_theta_p(tmp_path / str(sign), kind, optim, sign * move) for sign in (1, -1)
    )
    taken = torch.cat(
        [((one - other) * sign / (2 * move)).reshape(-1) for one, other, sign in zip(up, down, signs, strict=True)]
    )
    share = float(taken.clamp(0, 1).mean())
    assert (1 - math.exp(-pull)) / 1.5 < share < (1 - math.exp(-pull)) * 1.5
