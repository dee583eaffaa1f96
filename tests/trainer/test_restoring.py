"""What a resume and the best model restore, for models and data that make it hard."""

import pytest
import torch
from transformers import default_data_collator

from bissl_hf import BiSSLModel

from ..conftest import tiny_model, vit_model
from .trainers import make_trainer, same_tensors

SETTINGS = {"num_alternations": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


def noisy_collator(rows):
    """Draws random numbers, as the masking of a language model does."""
    batch = default_data_collator(rows)
    return {**batch, "pixel_values": batch["pixel_values"] + 0.1 * torch.randn_like(batch["pixel_values"])}


@pytest.mark.parametrize(
    ("build", "keywords"),
    [(vit_model, {}), (tiny_model, {"data_collator": noisy_collator, "lower_data_collator": noisy_collator})],
    ids=["vit", "random-collator"],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_same_run(tmp_path, build, keywords, workers):
    whole = make_trainer(tmp_path / "whole", model=build(), keywords=keywords, **SETTINGS)
    whole.train()
    steps = whole.state.global_step
    for step in (1, steps // 2, steps - 1):
        resumed = make_trainer(
            tmp_path / f"{step}", model=build(), keywords=keywords, dataloader_num_workers=workers, **SETTINGS
        )
        resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-{step}")
        resumed.callback_handler.train_dataloader.close()
        assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())


def test_the_best_model_is_that_of_its_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path, model=vit_model(), eval_rows=9, num_alternations=4, load_best_model_at_end=True,
        metric_for_best_model="eval_upper_loss", learning_rate=0.3, save_total_limit=None, save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    best = BiSSLModel.from_pretrained(trainer.state.best_model_checkpoint)
    assert same_tensors(trainer.model.state_dict(), best.state_dict())
    assert trainer.evaluate()["eval_upper_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_no_recalibration_images_keep_the_pretext_statistics(tmp_path):
    trainer = make_trainer(tmp_path, bn_recalibration_images=0)
    assert list(trainer.recalibration_batches()) == []
    expected = dict(trainer.model.lower.base_model.named_buffers())
    found = dict(trainer.aligned_model().base_model.named_buffers())
    assert same_tensors(found, expected)


@pytest.mark.parametrize("optim", ["sgd", "lars", "adam"])
def test_clipping_shortens_the_pull(tmp_path, optim):
    pulls = {}
    for bound in (0.0, 0.01):
        trainer = make_trainer(
            tmp_path / str(bound), lower_optim=optim, lower_max_grad_norm=bound, lower_learning_rate=0.01,
            num_alternations=1, lower_steps=1, lower_warmup_steps=0, lower_momentum=0.0,
        )  # fmt: skip
        trainer.train()
        log = next(log for log in trainer.state.log_history if "levels/pull" in log)
        pulls[bound] = (log["levels/pull"], min(1.0, bound / log["lower/gradient_norm"]) if bound else 1.0)
    (free, _), (clipped, factor) = pulls[0.0], pulls[0.01]
    assert factor < 0.1
    # The steps of LARS and Adam do not depend on the size of the gradient, but the share of the pull in it does not
    # change either: the proximal force is scaled along with the rest.
    expected = free * factor if optim == "sgd" else free
    assert clipped == pytest.approx(expected, rel=1e-2)


def test_losses_are_tried_without_side_effects(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.try_losses(rows=4)
    assert same_tensors(trainer.model.state_dict(), before)
    trainer.lower_dataset.images = trainer.lower_dataset.images.expand(-1, -1, 2, -1, -1)
    with pytest.raises(ValueError, match="channel"):
        trainer.try_losses(rows=4)


def test_many_broken_solves_are_warned_of(tmp_path, caplog):
    trainer = make_trainer(tmp_path, damping=0.0, num_alternations=1)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "solver/negative_curvature" in log)
    warned = [record for record in caplog.records if "Raise damping" in record.message]
    assert log["solver/negative_curvature"] >= 0.5
    assert len(warned) == 1
