"""Pre-training of the lower model alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import PretextTrainingArguments

from ..conftest import TinyImages, tiny_model
from .restatement import Momentum, rate, read


def add_noise(inputs, key):
    generator = torch.Generator().manual_seed(sum(part * 31**place for place, part in enumerate(key)))
    pixels = inputs["pixel_values"]
    return {"pixel_values": pixels + 0.1 * torch.rand(pixels.shape, generator=generator, dtype=pixels.dtype)}


def make_trainer(output_dir, *, rows: int = 20, dtype=torch.float32, transform=None, **overrides) -> PretextTrainer:
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "seed": 7, "save_strategy": "no"}
    args = PretextTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, report_to="none", **{**arguments, **overrides}
    )
    dataset = TinyImages(rows, pairs=True, dtype=dtype) if rows else None
    return PretextTrainer(tiny_model().lower.to(dtype), args, train_dataset=dataset, train_transform=transform)


@pytest.mark.parametrize(("optim", "lr"), [("lars", 4.8), ("sgd", 0.05)])
def test_it_follows_plain_loops_in_float64(tmp_path, optim, lr):
    trainer = make_trainer(
        tmp_path, rows=20, dtype=torch.float64, optim=optim, learning_rate=lr, weight_decay=0.02, warmup_steps=2,
        num_train_epochs=3,
    )  # fmt: skip
    model, dataset = tiny_model().lower.double().train(), TinyImages(20, pairs=True, dtype=torch.float64)
    trainer.train()
    optimizer = Momentum(list(model.parameters()), optim, 0.9, 0.02)
    for step in range(6):
        loss = model(**read(dataset, 8, step, 7, 0)).loss
        optimizer.step(torch.autograd.grad(loss, list(model.parameters())), lr * rate(step, 6, 2, 0.001))
    assert trainer.state.global_step == 6
    for (name, found), (_, expected) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-9, name


def test_clipping_bounds_the_gradient(tmp_path):
    """Without momentum and decay the first step has the length lr * bound."""
    trainer = make_trainer(
        tmp_path, dtype=torch.float64, optim="sgd", optim_args="momentum=0.0", learning_rate=0.1, weight_decay=0.0,
        max_grad_norm=1e-3, max_steps=1,
    )  # fmt: skip
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    moved = [new.detach() - old for new, old in zip(trainer.model.parameters(), before, strict=True)]
    assert float(torch.stack([(part**2).sum() for part in moved]).sum().sqrt()) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_is_the_same_run(tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None, "transform": add_noise}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    plain = make_trainer(tmp_path / "plain")
    plain.train()
    states = [trainer.model.state_dict() for trainer in (whole, resumed, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0]), "the transform must matter"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "seed was 7 and is 8"),
        ({"rows": 21}, "pretext was 2 batches of 8 from 20 examples and is 2 .* 21"),
    ],
)
def test_changed_settings_are_refused_at_a_resume(tmp_path, change, message):
    make_trainer(tmp_path / "whole", save_strategy="epoch", num_train_epochs=1).train()
    resumed = make_trainer(tmp_path / "resumed", save_strategy="epoch", num_train_epochs=1, **change)
    with pytest.raises(ValueError, match=f"The checkpoint belongs to another run: .*{message}"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_its_checkpoints_hold_a_manifest_and_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="epoch")
    trainer.train()
    last = tmp_path / "checkpoint-4"
    assert "model.safetensors" in json.loads((last / "manifest.json").read_text())["files"]
    weights = load_file(last / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize(("rows", "given"), [(7, 7), (0, 0)])
def test_too_few_examples_are_refused(tmp_path, rows, given):
    message = f"per_device_train_batch_size makes a batch of 8, and train_dataset has {given} examples"
    message = message if rows else "train_dataset is (missing|empty); it is needed for training"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=rows)


def test_bad_optimizer_options_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"LARS \(from optim='lars'\) does not take betas"):
        make_trainer(tmp_path, optim_args="betas=(0.9,0.99)").create_optimizer()


def test_a_batch_as_large_as_the_data_is_one_step(tmp_path):
    trainer = make_trainer(tmp_path, rows=8, num_train_epochs=3)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.state.log_history[0]["samples_per_second"] > 0


class Noise:
    """Views, and what they were made with."""

    def __init__(self, **settings):
        self.settings = settings

    def __call__(self, inputs, key):
        return add_noise(inputs, key)


def test_a_resume_has_the_views_the_task_and_the_loss_of_the_checkpoint(tmp_path, monkeypatch):
    def build(**settings):
        return make_trainer(tmp_path, transform=Noise(**settings), save_strategy="epoch", num_train_epochs=1)

    build(blur=[1.0, 0.1]).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    build(blur=[1.0, 0.1]).check_checkpoint(checkpoint)
    with pytest.raises(ValueError, match=r"blur of the lower data was \[1.0, 0.1\] and is \[1.0, 0.9\]"):
        build(blur=[1.0, 0.9]).check_checkpoint(checkpoint)
    trainer = build(blur=[1.0, 0.1])
    trainer.model.config.temperature = 0.9
    with pytest.raises(ValueError, match=r"temperature was 0.5 and is 0.9"):
        trainer.check_checkpoint(checkpoint)
    monkeypatch.setattr(type(trainer.model.config), "model_type", "byol")
    with pytest.raises(ValueError, match=r"model_type was simclr and is byol"):
        trainer.check_checkpoint(checkpoint)
