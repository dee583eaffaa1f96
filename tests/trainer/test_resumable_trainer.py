"""What the trainers share: the buffer of figures, parts of a batch, and what is refused."""

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from bissl_hf.data.alternation import StepKey, Stream, keyed_random_state
from bissl_hf.data.streams import model_randomness
from bissl_hf.run_lock import LOCK_NAME
from bissl_hf.trainer.metrics_buffer import MetricsBuffer
from bissl_hf.trainer.resumable_args import ResumableTrainingArguments
from bissl_hf.trainer.resumable_trainer import ResumableTrainer

from ..conftest import TinyImages
from ..processes import run_in_processes
from .test_pretext_trainer import make_trainer


def test_the_buffer_averages_by_name_and_forgets():
    buffer = MetricsBuffer(lambda tensors: tensors)
    for value in (1.0, 2.0, 6.0):
        buffer.add("a", value)
    buffer.add("b", torch.tensor(4, dtype=torch.int32))
    assert buffer.pop_averages() == {"a": 3.0, "b": 4.0}
    assert buffer.pop_averages() == {}
    buffer.add("a", 5.0)
    assert buffer.pop_averages() == {"a": 5.0}


def test_the_buffer_reduces_once_per_log_and_keeps_no_graph():
    calls = []

    def reduce(tensors):
        calls.append(len(tensors))
        return [tensor * 10 for tensor in tensors]

    buffer = MetricsBuffer(reduce)
    parameter = torch.tensor(2.0, requires_grad=True)
    buffer.add("a", parameter * 3)
    buffer.add("b", True)
    assert not buffer._sums["a"].requires_grad
    assert buffer.pop_averages() == {"a": 60.0, "b": 10.0}
    assert calls == [1]


def test_the_buffer_survives_a_checkpoint_to_the_last_bit():
    whole, first = MetricsBuffer(lambda tensors: tensors), MetricsBuffer(lambda tensors: tensors)
    second = MetricsBuffer(lambda tensors: tensors)
    for value in (0.1, 0.7):
        whole.add("a", value)
        first.add("a", value)
    second.add("gone", 1.0)
    second.load_state_dict(first.state_dict())
    for buffer in (whole, second):
        buffer.add("a", 1 / 3)
    assert second.pop_averages() == whole.pop_averages()


def test_the_buffer_shows_what_is_not_finite():
    buffer = MetricsBuffer(lambda tensors: tensors)
    buffer.add("a", 1.0)
    buffer.add("a", float("inf"))
    assert buffer.pop_averages()["a"] == float("inf")


def keyed_args(tmp_path, **overrides) -> ResumableTrainingArguments:
    return ResumableTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **overrides)


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ResumableTrainingArguments, "n_gpu", 2)
    args = keyed_args(tmp_path)
    with pytest.raises(ValueError, match=r"One process sees 2 GPUs .*--num_processes 2.*CUDA_VISIBLE_DEVICES"):
        ResumableTrainer(args=args, model=torch.nn.Linear(1, 1))


def test_optimizers_are_refused(tmp_path):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers is not supported: name them in the arguments"):
        ResumableTrainer(args=keyed_args(tmp_path), model=model, optimizers=(optimizer, None))


def test_no_optimizers_are_accepted(tmp_path):
    trainer = ResumableTrainer(args=keyed_args(tmp_path), model=torch.nn.Linear(1, 1), optimizers=(None, None))
    assert trainer.optimizer is None
    assert isinstance(trainer.args, TrainingArguments)


def test_a_models_randomness_follows_the_key_and_differs_from_that_of_its_views():
    key = StepKey(1, 0, 2, 3, 0)
    before = torch.get_rng_state()
    draws = []
    for name in (key, key, key._replace(step=4), key._replace(rank=1)):
        with model_randomness(name):
            draws.append(float(torch.rand(())))
    with keyed_random_state(key):
        draws.append(float(torch.rand(())))
    assert torch.equal(torch.get_rng_state(), before)
    assert draws[0] == draws[1]
    assert len(set(draws)) == 4


def test_a_transform_gets_the_key_as_plain_numbers(tmp_path):
    trainer = ResumableTrainer(args=keyed_args(tmp_path), model=torch.nn.Linear(1, 1))
    seen = []

    def transform(inputs, key):
        seen.append(key)
        return {"x": inputs["x"] + 1}

    key = StepKey(1, 0, 2, 3, 0)
    trainer.streams.add(Stream.LOWER, None, transform)
    moved = trainer.streams.prepare({"x": torch.zeros(2)}, key)
    assert torch.equal(moved["x"], torch.ones(2))
    assert seen == [(1, 0, 2, 3, 0)]
    assert type(seen[0]) is tuple
    trainer.streams.add(Stream.LOWER, None, None)
    assert torch.equal(trainer.streams.prepare({"x": torch.zeros(2)}, key)["x"], torch.zeros(2))


def test_a_run_holds_its_folder_while_it_trains(tmp_path):
    held = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            held.append((tmp_path / LOCK_NAME).is_file())

    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.add_callback(Look())
    trainer.train()
    assert held == [True]
    assert not (tmp_path / LOCK_NAME).exists()
    (tmp_path / LOCK_NAME).write_text('{"pid": 1, "host": "elsewhere", "started": "now"}')
    with pytest.raises(ValueError, match="is in use by process 1 on elsewhere"):
        make_trainer(tmp_path, max_steps=1).train()


class Told(TinyImages):
    """Images that say what they are."""

    def __init__(self, rows, name, **keywords):
        super().__init__(rows, **keywords)
        self.name = name

    def checksum(self):
        return self.name


def test_a_resume_on_other_data_of_the_same_size_is_refused(tmp_path):
    trainers = []
    for name in ("first", "second"):
        trainer = make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.source.dataset = Told(20, name, pairs=True)
        trainers.append(trainer)
    trainers[0].train()
    trainers[0].check_checkpoint(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="checksum of the lower data was first and is second"):
        trainers[1].check_checkpoint(tmp_path / "checkpoint-1")


def train_with(folder: str, name: str) -> None:
    differing = {name: 7 + dist.get_rank()}
    with pytest.raises(ValueError, match=rf"different arguments: .*{name} is 7 on process 0 and 8 on process 1"):
        make_trainer(folder, **differing)


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["seed", "max_steps"])
def test_processes_with_different_arguments_are_refused(tmp_path, name):
    run_in_processes(train_with, 2, str(tmp_path), name)


@pytest.mark.parametrize(("workers", "seconds"), [(1, 7), (0, 0)])
def test_every_loader_waits_no_longer_than_it_may(tmp_path, workers, seconds):
    trainer = make_trainer(
        tmp_path, dataloader_num_workers=workers, dataloader_prefetch_factor=2 if workers else None,
        dataloader_timeout=7,
    )  # fmt: skip
    loaders = [trainer.get_train_dataloader(), trainer.get_eval_dataloader(TinyImages(5))]
    loaders.append(trainer.get_test_dataloader(TinyImages(5)))
    assert [loader.timeout for loader in loaders] == [seconds] * 3
