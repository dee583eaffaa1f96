"""Each field of transformers.TrainingArguments acts or is refused; none is ignored."""

from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments

from bissl_hf import BiSSLTrainingArguments
from bissl_hf.trainer.fields import (
    REFUSED,
    REFUSED_BY_ALTERNATIONS,
    REFUSED_IN_JOINT_TRAINING,
    REFUSED_IN_PRETRAINING,
    REFUSED_IN_SECOND_ORDER,
    is_set,
)
from bissl_hf.trainer.training_args import (
    FineTuningArguments,
    JointTrainingArguments,
    PretextTrainingArguments,
    ResumableTrainingArguments,
)

FIELDS = {field.name: field for field in fields(TrainingArguments)}
BASIC = {"output_dir": "unused", "use_cpu": True, "report_to": "none"}
# For fields whose default does not tell what another value looks like.
OTHERS = {
    "fsdp": "full_shard", "fsdp_config": {"min_num_params": 1}, "deepspeed": "zero.json", "parallelism_config": "x",
    "liger_kernel_config": {"rope": True}, "hub_token": "secret", "gradient_accumulation_steps": 2,
    "neftune_noise_alpha": 0.1, "optim_target_modules": "all-linear", "torch_empty_cache_steps": 1,
    "include_num_input_tokens_seen": "all", "label_names": ["y"], "train_sampling_strategy": "group_by_length",
    "length_column_name": "size", "torch_compile_backend": "eager", "torch_compile_mode": "default",
    "label_smoothing_factor": 0.1, "logging_nan_inf_filter": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_checkpointing_kwargs": {"use_reentrant": False},
}  # fmt: skip

# Those that act, in every trainer or in the stages that do not refuse them.
ACTING = frozenset(
    (
        *("output_dir", "per_device_train_batch_size", "per_device_eval_batch_size", "num_train_epochs", "max_steps"),
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor"),
        *("bf16", "fp16", "tf32", "full_determinism", "seed", "data_seed", "use_cpu"),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level"),
        *("log_level_replica", "disable_tqdm", "report_to", "run_name", "project"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_use_gather_object", "do_eval"),
        *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics", "remove_unused_columns"),
        *("save_strategy", "save_steps", "save_on_each_node", "save_total_limit", "load_best_model_at_end"),
        *("metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint"),
        *("resume_from_checkpoint", "push_to_hub", "hub_private_repo", "hub_model_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "accelerator_config", "local_rank", "debug", "skip_memory_metrics"),
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
        *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
        *("ddp_backend", "ddp_timeout"),
    )
)


def other_value(name):
    default = FIELDS[name].default
    return OTHERS.get(name, not default)


def test_every_field_acts_or_is_refused():
    """A new release of transformers that adds a field fails here until it is known which."""
    assert set(FIELDS) == ACTING | set(REFUSED)
    assert not ACTING & set(REFUSED)
    assert set(REFUSED_IN_SECOND_ORDER) | set(REFUSED_IN_PRETRAINING) | set(REFUSED_BY_ALTERNATIONS) <= ACTING


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_field_is_refused_with_a_way_out(name):
    with pytest.raises(ValueError, match=rf"^{name} is .*, which is not supported: .{{20,}}\.$") as caught:
        ResumableTrainingArguments(**BASIC, **{name: other_value(name)})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(REFUSED_IN_SECOND_ORDER))
def test_what_second_derivatives_forbid_is_refused_for_them_alone(name):
    with pytest.raises(ValueError, match=rf"{name} is .*no second derivative; .*first-order solver"):
        BiSSLTrainingArguments(**BASIC, solver="cg", **{name: other_value(name)})


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # transformers 5.23 deprecates the old names, 2026-11
@pytest.mark.parametrize("name", sorted(REFUSED_IN_SECOND_ORDER))
@pytest.mark.parametrize("kind", [BiSSLTrainingArguments, FineTuningArguments, PretextTrainingArguments])
def test_what_second_derivatives_forbid_is_allowed_without_them(kind, name):
    solver = {"solver": "identity"} if kind is BiSSLTrainingArguments else {}
    args = kind(**BASIC, **solver, **{name: other_value(name)})
    assert getattr(args, name) == other_value(name)
    assert not args.takes_second_derivatives
    assert BiSSLTrainingArguments(**BASIC, solver="cg").takes_second_derivatives  # not hindered by the run before


def test_what_a_stage_has_no_use_for_is_refused_there():
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1, .*no labels to smooth"):
        PretextTrainingArguments(**BASIC, label_smoothing_factor=0.1)
    for name in REFUSED_IN_JOINT_TRAINING:
        with pytest.raises(ValueError, match=rf"{name} is .*not compiled"):
            JointTrainingArguments(**BASIC, **{name: other_value(name)})
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 1\.0; it must be at least 0 and below 1"):
        FineTuningArguments(**BASIC, label_smoothing_factor=1.0)
    with pytest.raises(ValueError, match=r"do_eval is True and eval_strategy 'no'"):
        PretextTrainingArguments(**BASIC, do_eval=True)


def test_the_fields_of_adam_reach_adam():
    args = ResumableTrainingArguments(**BASIC, optim="adamw", adam_beta1=0.5, adam_epsilon=1e-3)
    optimizer = args.level(num_steps=1).build_optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.5, 0.999), 1e-3)


def test_the_fields_of_adam_are_refused_elsewhere():
    for name, value in (("adam_beta1", 0.5), ("adam_beta2", 0.5), ("adam_epsilon", 1e-3)):
        with pytest.raises(ValueError, match=rf"{name} is {value}, and optim 'sgd' has no such number"):
            ResumableTrainingArguments(**BASIC, optim="sgd", **{name: value})
    with pytest.raises(ValueError, match=r"adam_beta1 is 0\.5 and optim_args sets betas too"):
        ResumableTrainingArguments(**BASIC, optim="adamw", adam_beta1=0.5, optim_args="betas=(0.1,0.2)")


@pytest.mark.parametrize(
    ("value", "default", "expected"),
    [
        (None, False, False),
        ("", None, False),
        ([], None, False),
        (False, "no", False),
        (False, True, True),
        (2, 1, True),
    ],
)
def test_empty_values_are_the_same(value, default, expected):
    assert is_set(value, default) is expected
