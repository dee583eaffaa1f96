"""Joint training of both tasks on one backbone."""

import pytest
import torch
import torch.distributed as dist

from bissl_hf.distributed import rank, world_size
from bissl_hf.trainer.joint_trainer import JointTrainer
from bissl_hf.trainer.training_args import JointTrainingArguments

from ..conftest import TinyImages, tiny_model
from ..processes import run_in_processes
from .restatement import UPPER, Momentum, rate, read
from .test_processes import layer_norm_model
from .trainers import same_tensors


def make_trainer(
    output_dir, *, model=None, rows: int = 20, labelled: int = 12, transform=None, **overrides
) -> JointTrainer:
    settings = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "per_device_labelled_batch_size": 4, "seed": 7,
        "save_strategy": "no", "optim": "sgd", "learning_rate": 0.05, "weight_decay": 0.02, "warmup_steps": 2,
    }  # fmt: skip
    args = JointTrainingArguments(
        output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, report_to="none", **{**settings, **overrides}
    )
    return JointTrainer(
        (model or tiny_model()).double(),
        args,
        train_dataset=TinyImages(labelled, dtype=torch.float64),
        lower_dataset=TinyImages(rows, pairs=True, dtype=torch.float64),
        lower_transform=transform,
    )


def test_it_follows_plain_loops_in_float64(tmp_path):
    trainer = make_trainer(tmp_path, downstream_weight=0.7)
    start = tiny_model().double()
    lower, classifier = start.lower.train(), start.aligned_model().train()
    # One backbone: the classifier's parameters are those of the lower model.
    shared = dict(lower.base_model.named_parameters())
    for name, parameter in list(classifier.base_model.named_parameters()):
        owner, _, last = name.rpartition(".")
        assert parameter.shape == shared[name].shape
        setattr(classifier.base_model.get_submodule(owner), last, shared[name])
    parameters = list({id(p): p for p in (*lower.parameters(), *classifier.parameters())}.values())
    optimizer = Momentum(parameters, "sgd", 0.9, 0.02)
    pretext, labelled = (TinyImages(n, pairs=p, dtype=torch.float64) for n, p in ((20, True), (12, False)))
    for step in range(4):
        loss = lower(**read(pretext, 8, step, 7, 0)).loss
        loss = loss + 0.7 * classifier(**read(labelled, 4, step, 7, UPPER)).loss
        optimizer.step(torch.autograd.grad(loss, parameters), 0.05 * rate(step, 4, 2, 0.001))
    trainer.train()
    assert trainer.state.global_step == 4
    found, before = trainer.model.aligned_model(), tiny_model().double()
    for (name, value), (_, expected) in zip(found.named_parameters(), classifier.named_parameters(), strict=True):
        assert float((value - expected).detach().abs().max()) < 1e-9, name
    for value, expected in zip(trainer.model.lower.buffers(), lower.buffers(), strict=True):
        assert torch.allclose(value, expected), "running statistics are those of the pretext views alone"
    for value, old in zip(
        trainer.model.backbone_parameters("upper"), before.backbone_parameters("upper"), strict=True
    ):
        assert torch.equal(value, old), "theta_D is not used"


def test_a_resumed_run_is_the_same_run(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert same_tensors(whole.model.state_dict(), resumed.model.state_dict())


def test_other_labelled_examples_are_refused_at_a_resume(tmp_path):
    make_trainer(tmp_path / "whole", save_strategy="epoch", num_train_epochs=1).train()
    resumed = make_trainer(tmp_path / "resumed", save_strategy="epoch", num_train_epochs=1, labelled=13)
    with pytest.raises(ValueError, match=r"downstream was 2 batches of 4 from 12 examples and is 2 .* 13"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_a_try_leaves_the_model_as_it_was(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.try_loss(rows=4)
    assert same_tensors(trainer.model.state_dict(), before)


def train_and_keep(folder, file):
    """Trains on global batches that do not depend on the number of processes."""
    trainer = make_trainer(
        folder,
        model=layer_norm_model(rank()),
        per_device_train_batch_size=8 // world_size(),
        per_device_labelled_batch_size=4 // world_size(),
    )
    trainer.train()
    if rank() == 0:
        torch.save(trainer.model.state_dict(), file)
    for value in trainer.model.state_dict().values():
        others = [torch.empty_like(value) for _ in range(world_size())]
        dist.all_gather(others, value.contiguous())
        assert all(torch.equal(other, value) for other in others)


@pytest.mark.distributed
def test_two_processes_follow_one(tmp_path):
    for processes in (1, 2):
        run_in_processes(train_and_keep, processes, tmp_path / f"run{processes}", tmp_path / f"{processes}.pt")
    one, two = (torch.load(tmp_path / f"{processes}.pt", weights_only=True) for processes in (1, 2))
    for name, value in one.items():
        assert float((value - two[name]).abs().max()) < 1e-12, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"downstream_weight": -1.0}, "downstream_weight is -1.0; it must be a finite number of at least 0"),
        ({"per_device_labelled_batch_size": 0}, "per_device_labelled_batch_size is 0; it must be"),
        ({"rows": 7}, "per_device_train_batch_size makes a batch of 8, and lower_dataset has 7 examples"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **change)
