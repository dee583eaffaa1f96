"""A run whose last step is behind it takes no further one, whatever was written of it."""

import pytest
import torch

from bissl_hf.trainer.callbacks import EpochBoundary

from .test_pretext_trainer import make_trainer


@pytest.mark.parametrize(
    "length",
    [{"max_steps": 3}, {"max_steps": 4}, {"num_train_epochs": 1.5}],
    ids=["inside an epoch", "at the end of an epoch", "a fraction of epochs"],
)
@pytest.mark.parametrize("saving", [{"save_strategy": "epoch"}, {"save_strategy": "steps", "save_steps": 1}])
def test_a_finished_run_takes_no_further_step(tmp_path, length, saving):
    whole = make_trainer(tmp_path, **length, **saving)
    whole.train()
    last = whole.state.global_step
    for _ in range(2):
        resumed = make_trainer(tmp_path, **length, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
        assert resumed.state.global_step == last
        pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (whole, resumed)]
        assert losses[0] == losses[1]


def test_a_checkpoint_of_the_last_step_waits_for_the_log_of_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    assert any(isinstance(callback, EpochBoundary) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    resumed = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    logged = [row["step"] for row in resumed.state.log_history if "loss" in row]
    assert logged == [2, 3]
