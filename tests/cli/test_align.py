"""Arguments of the command that aligns: what is checked beside the trainer's own."""

import pytest

from bissl_hf.cli.align import ModelArguments, check_pretraining, num_pretrain_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain_steps": -1}, "pretrain_steps is -1; it must be at least 0"),
        ({"pretrain_batch_size": 37}, "pretrain_batch_size is 37; it must be between 2 and 36"),
        ({"pretrain_batch_size": 1}, "pretrain_batch_size is 1; it must be between 2 and 36"),
        ({"pretrain_optim": "sgdd"}, "pretrain_optim is 'sgdd'; it must be one of"),
        ({"pretrain_learning_rate": -1.0}, "pretrain_learning_rate is -1.0; it must be at least 0"),
        ({"pretrain_learning_rate": float("nan")}, "pretrain_learning_rate is nan"),
        ({"pretrain_weight_decay": -1.0}, "pretrain_weight_decay is -1.0"),
        ({"pretrain_warmup_steps": 5}, "pretrain_warmup_steps is 5; it must be between 0 and 4"),
        ({"pretrain_warmup_steps": -1}, "pretrain_warmup_steps is -1"),
    ],
)
def test_settings_of_pre_training_are_called_by_the_names_of_the_command(changes, message):
    arguments = ModelArguments(
        **{"pretrain_steps": 4, "pretrain_batch_size": 8, "pretrain_warmup_steps": 0, **changes}
    )
    with pytest.raises(ValueError, match=message):
        check_pretraining(arguments, num_pretrain_steps(arguments), arguments.pretrain_batch_size, 36)


def test_a_model_that_is_pre_trained_takes_no_steps_by_default():
    assert num_pretrain_steps(ModelArguments()) == 1000
    assert num_pretrain_steps(ModelArguments(lower_model="folder")) == 0
    assert num_pretrain_steps(ModelArguments(lower_model="folder", pretrain_steps=3)) == 3
    with pytest.raises(ValueError, match="pretrain_steps is 3 and lora_rank is 4; adapters go on a model"):
        num_pretrain_steps(ModelArguments(lora_rank=4, pretrain_steps=3))
