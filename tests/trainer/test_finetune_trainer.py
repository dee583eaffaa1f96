"""Fine-tuning: its steps, its batch norm, and that it can be interrupted."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import ResNetForImageClassification

from bissl_hf.data.alternation import batch_indices
from bissl_hf.models.batch_norm import batch_norm_modules, recalibrate_batch_norm
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer
from bissl_hf.trainer.training_args import FineTuningArguments

from ..conftest import TinyImages, tiny_resnet_config
from .restatement import Momentum, read


def classifier(seed: int = 0) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    return ResNetForImageClassification(tiny_resnet_config())


def make_trainer(output_dir, *, rows: int = 20, dtype=torch.float32, model=None, eval_rows: int = 9, **overrides):
    arguments = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "seed": 7, "save_strategy": "no"}
    args = FineTuningArguments(
        output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, report_to="none", **{**arguments, **overrides}
    )
    return FineTuneTrainer(
        model=(model or classifier()).to(dtype),
        args=args,
        train_dataset=TinyImages(rows, dtype=dtype),
        eval_dataset=TinyImages(eval_rows, dtype=dtype) if eval_rows else None,
    )


def logits(model, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images).logits


def test_it_follows_plain_loops_in_float64(tmp_path):
    """SGD with momentum and a cosine to zero, over the downstream stream's batches."""
    trainer = make_trainer(tmp_path, dtype=torch.float64, learning_rate=0.05, weight_decay=0.02, num_train_epochs=3)
    model, dataset = classifier().double().train(), TinyImages(20, dtype=torch.float64)
    trainer.train()
    optimizer = Momentum(list(model.parameters()), "sgd", 0.9, 0.02)
    for step in range(6):
        batch = read(dataset, 8, step, 7, 1)
        loss = F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"])
        rate = 0.05 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / 6, dtype=torch.float64)))
        optimizer.step(torch.autograd.grad(loss, list(model.parameters())), float(rate))
    for (name, found), (_, expected) in zip(trainer.model.named_parameters(), model.named_parameters(), strict=True):
        assert float((found - expected).detach().abs().max()) < 1e-9, name


def test_batch_norm_does_not_remember_where_the_model_comes_from(tmp_path):
    """Models that differ in their running statistics only are the same model after fine-tuning."""
    results = []
    for shift in (0.0, 50.0):
        model = classifier()
        for layer in batch_norm_modules(model):
            layer.running_mean += shift
        trainer = make_trainer(tmp_path, model=model, num_train_epochs=1)
        trainer.train()
        results.append(trainer.model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_the_first_statistics_are_those_of_training_images(tmp_path):
    trainer = make_trainer(tmp_path, bn_recalibration_images=16, per_device_eval_batch_size=8)
    expected, dataset = classifier(), TinyImages(20)
    rows = [batch_indices(20, 8, position, seed=7, stream=4) for position in range(2)]
    recalibrate_batch_norm(
        expected, [{"pixel_values": torch.stack([dataset[int(row)]["pixel_values"] for row in part])} for part in rows]
    )
    trainer.start_batch_norm()
    for found, layer in zip(batch_norm_modules(trainer.model), batch_norm_modules(expected), strict=True):
        assert torch.allclose(found.running_mean, layer.running_mean)
        assert torch.allclose(found.running_var, layer.running_var)


def test_without_images_for_them_the_first_statistics_are_the_models_own(tmp_path):
    trainer = make_trainer(tmp_path, bn_recalibration_images=0)
    before = [layer.running_mean.clone() for layer in batch_norm_modules(trainer.model)]
    trainer.start_batch_norm()
    after = [layer.running_mean for layer in batch_norm_modules(trainer.model)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_recalibrated_statistics_are_those_of_a_copy(tmp_path):
    """They are what evaluation sees; the live ones go on as they would have."""
    plain, copied = (
        make_trainer(tmp_path / name, batch_norm=name, num_train_epochs=1) for name in ("running", "recalibrated")
    )
    for trainer in (plain, copied):
        trainer.train()
    assert all(torch.equal(value, copied.model.state_dict()[name]) for name, value in plain.model.state_dict().items())
    assert plain.final_model() is plain.model
    final, images = copied.final_model(), TinyImages(9)
    assert not torch.equal(batch_norm_modules(final)[0].running_mean, batch_norm_modules(copied.model)[0].running_mean)
    for trainer, model in ((plain, plain.model), (copied, final)):
        expected = F.cross_entropy(logits(model, images.images), images.labels)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_run_is_the_same_run(tmp_path, step):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.training_seconds > 0


def test_the_clock_goes_on_where_it_was(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._clock.load_state_dict({"wall": 1000.0, "processor": 900.0})
    assert trainer.training_seconds == 1000.0
    trainer.train()
    assert 0 < trainer.training_seconds < 500, "a run from its start forgets what was before"


def test_a_batch_larger_than_the_data_is_cut(tmp_path):
    trainer = make_trainer(tmp_path, rows=5, eval_rows=0, num_train_epochs=3)
    trainer.train()
    assert trainer.source.batch_size == 5
    assert trainer.state.global_step == 3
    assert trainer.args.eval_strategy == "no"


def test_no_examples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="train_dataset is empty; it is needed"):
        make_trainer(tmp_path, rows=0)


def test_one_row_per_process_is_refused_with_batch_norm(tmp_path):
    message = r"per_device_train_batch_size: batch norm would have no statistics, .* a batch of 1 row\. Choose sizes"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, per_device_train_batch_size=1)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, rows=1)


@pytest.mark.parametrize("settings", [{"per_device_eval_batch_size": 1}, {"bn_recalibration_images": 1}])
def test_statistics_are_estimated_on_batches_of_two_rows_at_least(tmp_path, settings):
    """Feature maps of one pixel, of which one row has no statistics."""
    trainer = make_trainer(tmp_path, batch_norm="recalibrated", num_train_epochs=1, **settings)
    sizes = {len(batch["pixel_values"]) for batch in trainer.calibration_batches(trainer.args.bn_recalibration_images)}
    assert sizes == {2}
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss"])
