"""Class weights in the three trainers, against the weighted loss written out in float64."""

import math
from typing import Any

import pytest
import torch

from bissl_hf.tasks.class_weights import DownstreamLoss
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer
from bissl_hf.trainer.joint_trainer import JointTrainer
from bissl_hf.trainer.training_args import FineTuningArguments, JointTrainingArguments

from ..conftest import TinyImages, tiny_model
from .restatement import UPPER, Momentum, read
from .test_finetune_trainer import classifier
from .trainers import make_trainer

WEIGHTS = [0.5, 2.0, 3.0]
ARGUMENTS: dict[str, Any] = {
    "use_cpu": True, "disable_tqdm": True, "report_to": "none", "save_strategy": "no", "seed": 7, "max_steps": 1,
    "learning_rate": 0.1, "weight_decay": 0.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    "warmup_steps": 0, "optim": "sgd",
}  # fmt: skip


def written_out(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    terms = [
        WEIGHTS[label] * (torch.logsumexp(row, 0) - row[label])
        for row, label in zip(logits, labels.tolist(), strict=True)
    ]
    return sum(terms, torch.zeros(())) / len(terms)


def labelled() -> TinyImages:
    return TinyImages(12, dtype=torch.float64)


def test_fine_tuning_takes_the_weighted_step_and_evaluates_the_loss_that_it_trains(tmp_path):
    args = FineTuningArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **ARGUMENTS)
    trainer = FineTuneTrainer(
        model=classifier().double(),
        args=args,
        train_dataset=labelled(),
        eval_dataset=labelled(),
        class_weights=WEIGHTS,
    )
    model, batch = classifier().double().train(), read(labelled(), 8, 0, 7, 1)
    trainer.train()
    loss = written_out(model(batch["pixel_values"]).logits, batch["labels"])
    Momentum(list(model.parameters()), "sgd", 0.9, 0.0).step(torch.autograd.grad(loss, list(model.parameters())), 0.1)
    for value, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    batch = read(labelled(), 12, 0, 7, 1)
    expected = written_out(trainer.final_model()(batch["pixel_values"]).logits.detach(), batch["labels"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="label_smoothing_factor and class_weights are both given; leave one"):
        FineTuneTrainer(
            model=classifier(),
            args=FineTuningArguments(output_dir=str(tmp_path), label_smoothing_factor=0.1, **ARGUMENTS),
            train_dataset=labelled(),
            class_weights=WEIGHTS,
        )
    assert trainer.resume_settings()["class_weights"] == WEIGHTS


def test_joint_training_weighs_the_downstream_loss(tmp_path):
    args = JointTrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8, per_device_labelled_batch_size=4, **ARGUMENTS
    )
    data = {"train_dataset": labelled(), "lower_dataset": TinyImages(20, pairs=True, dtype=torch.float64)}
    losses = {}
    for name, weights in (("weighted", WEIGHTS), ("plain", None)):
        trainer = JointTrainer(tiny_model().double(), args, class_weights=weights, **data)
        batch, key = trainer.streams.first_rows(trainer.stream, 8)
        losses[name] = trainer.joint_loss(batch, key)
    assert trainer.resume_settings()["class_weights"] is None
    model, rows = tiny_model().double().train(), read(labelled(), 4, 0, 7, UPPER)
    outputs = model(level="aligned", **rows)
    difference = written_out(outputs.logits, rows["labels"]) - outputs.loss
    torch.testing.assert_close(losses["weighted"] - losses["plain"], difference, rtol=0, atol=1e-12)
    weighted = JointTrainer(tiny_model().double(), args, class_weights=WEIGHTS, eval_dataset=labelled(), **data)
    rows = read(labelled(), 12, 0, 7, 1)
    expected = written_out(weighted.final_model()(rows["pixel_values"]).logits.detach(), rows["labels"])
    assert weighted.evaluate()["eval_loss"] == pytest.approx(float(expected))


def test_bissl_weighs_the_upper_loss_at_both_models(tmp_path):
    trainer = make_trainer(tmp_path, dtype=torch.float64, keywords={"class_weights": "balanced"})
    counts = torch.bincount(labelled().labels, minlength=3)
    batch = read(labelled(), 6, 0, 7, UPPER)
    for model in (trainer.model.upper, lambda **inputs: trainer.model(level="aligned", **inputs)):
        logits = model(pixel_values=batch["pixel_values"]).logits
        terms = [
            12 / (3 * int(counts[label])) * (math.log(sum(math.exp(value) for value in row)) - row[label])
            for row, label in zip(logits.tolist(), batch["labels"].tolist(), strict=True)
        ]
        assert trainer.compute_upper_loss(model, batch).item() == pytest.approx(sum(terms) / 6, abs=1e-12)
    trainer.train()
    assert trainer.state.global_step > 0
    rows, weights = read(labelled(), 12, 0, 7, UPPER), 12 / (3 * counts.double())
    logits = trainer.aligned_model().double()(pixel_values=rows["pixel_values"]).logits
    terms = weights[rows["labels"]] * torch.nn.functional.cross_entropy(logits, rows["labels"], reduction="none")
    assert trainer.evaluate(labelled())["eval_loss"] == pytest.approx(float(terms.detach().mean()))
    with pytest.raises(ValueError, match="label_smoothing_factor and class_weights are both given; leave one"):
        make_trainer(tmp_path, keywords={"class_weights": "balanced"}, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("problem_type", "num_labels", "message"),
    [
        ("multi_label_classification", 3, "the task is multi_label_classification with 3 outputs"),
        ("regression", 1, "the task is regression with 1 outputs"),
    ],
)
def test_other_tasks_are_refused(problem_type, num_labels, message):
    config = classifier().config
    config.problem_type, config.num_labels = problem_type, num_labels
    with pytest.raises(ValueError, match=message):
        DownstreamLoss("balanced", config=config, dataset=labelled())


def test_weights_need_examples():
    with pytest.raises(ValueError, match="class_weights is 'balanced', and there is no train_dataset; give one"):
        DownstreamLoss("balanced", config=classifier().config, dataset=None)


def test_labels_are_read_from_any_data_set():
    labels = [0, 1, 1, 2]
    loss = DownstreamLoss("balanced", config=classifier().config, dataset=[{"labels": label} for label in labels])
    assert loss.describe() == pytest.approx([4 / 3, 2 / 3, 4 / 3])
