"""The stage of pre-training: trained once, and taken over by later starts."""

import pytest
import torch
from transformers import TrainerCallback

from bissl_hf.checkpoints import find_defect
from bissl_hf.cli.pretraining import pretrain
from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import PretextTrainingArguments

from ..conftest import TinyImages, flip_a_bit, tiny_model


def trainer_in(folder, max_steps: int, seed: int = 0) -> PretextTrainer:
    args = PretextTrainingArguments(
        output_dir=str(folder), max_steps=max_steps, per_device_train_batch_size=8, use_cpu=True, disable_tqdm=True
    )
    return PretextTrainer(tiny_model(seed).lower, args, train_dataset=TinyImages(16, pairs=True))


class StopAfter(TrainerCallback):
    """Interrupts training with a checkpoint after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = control.should_save = state.global_step == self.steps


def weights(trainer: PretextTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_finished_model_is_taken_over(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = trainer_in(tmp_path, 3), trainer_in(tmp_path, 3, seed=1)
    untrained = weights(first)
    pretrain(first)
    assert capsys.readouterr().out.count("Pre-training of SimCLRForPreTraining for 3 steps") == 1
    assert not equal(weights(first), untrained)
    pretrain(second)
    assert "Pre-training" not in capsys.readouterr().out
    assert equal(weights(second), weights(first))


def test_an_unfinished_one_goes_on(tmp_path) -> None:
    whole, cut = trainer_in(tmp_path / "whole", 4), trainer_in(tmp_path / "cut", 4)
    pretrain(whole)
    cut.add_callback(StopAfter(2))
    cut.train()
    resumed = trainer_in(tmp_path / "cut", 4)
    pretrain(resumed)
    assert resumed.state.global_step == 4
    assert equal(weights(resumed), weights(whole))


def test_a_damaged_model_is_made_anew_from_the_last_checkpoint(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = trainer_in(tmp_path, 3), trainer_in(tmp_path, 3)
    pretrain(first)
    flip_a_bit(tmp_path / "model" / "model.safetensors")
    pretrain(second)
    assert "model, which is not whole: model.safetensors is damaged" in capsys.readouterr().err
    assert equal(weights(second), weights(first))
    assert find_defect(tmp_path / "model") is None


def test_no_steps_leave_the_model_as_it_is(tmp_path) -> None:
    trainer = trainer_in(tmp_path, 0)
    before = weights(trainer)
    pretrain(trainer)
    assert equal(weights(trainer), before)
    assert not (tmp_path / "model").exists()
