"""Fields of `transformers.TrainingArguments` (5.23) that are refused, with the reason and the way out. All others act,
and a test knows each of them. `--help` hides the refused ones."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

_WHOLE_MODELS = (
    "the model would be split up, and the hypergradient needs the whole backbone in each process; leave it out and "
    "use plain data parallelism, as `accelerate launch --multi_gpu` starts it, with curvature_mode='recompute' and "
    "micro-batches to save memory"
)
SECOND_ORDER = "a compiled graph has no second derivative"
_FIRST_ORDER_WAY = "leave it out, or take a first-order solver (mfac, identity, none)"
_NO_LABELS = "a pretext loss has no labels to smooth; leave it out"
_LIGER = "its kernels have no second derivative and are made for language models; leave it out"
_FULL_EVAL = (
    "it would turn the weights that are trained into half precision; leave it out, evaluations follow bf16 and fp16"
)
_KEYED = "each step reads the rows that its key names, a permutation of the data; leave it out"
_SCRIPTS = "it is a switch for scripts that nothing here reads; leave it out and call train(), evaluate() or predict()"

REFUSED: dict[str, str] = {
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _WHOLE_MODELS),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), _LIGER),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _FULL_EVAL),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), _KEYED),
    **dict.fromkeys(("do_train", "do_predict"), _SCRIPTS),
    "hub_token": "it would be written in clear beside the checkpoints; set the environment variable HF_TOKEN instead",
    "gradient_accumulation_steps": "it must be 1. To save memory set a smaller batch, or for BiSSL "
    "lower_micro_batch_size and upper_micro_batch_size, which split a batch inside its step",
    "auto_find_batch_size": "a smaller batch is another run; set the batch, or for BiSSL the micro-batches, by hand",
    "neftune_noise_alpha": "the noise would not follow the keys of the steps; leave it out",
    "average_tokens_across_devices": "losses are means over the rows of a process; leave it out",
    "optim_target_modules": "optimizers move all parameters of their level; leave it out and freeze some instead",
    "use_cache": "training generates nothing; leave it out",
    "torch_empty_cache_steps": "steps keep their memory for the next one; leave it out and set micro-batches",
    "include_num_input_tokens_seen": "batches are counted in rows (samples_per_second); leave it out",
    "logging_nan_inf_filter": "a loss that is not finite is always shown; leave it out",
    "save_only_model": "a resume needs the rest of a checkpoint; leave it out, save_model() writes the model alone",
    "enable_jit_checkpoint": "checkpoints are written at the end of steps only; leave it out and set save_steps",
    "dataloader_drop_last": "evaluations would leave rows out, and training always drops them; leave it out",
    "dataloader_in_order": "batches belong to their steps; leave it out",
    "ignore_data_skip": "a resumed run would read other batches; leave it out, skipping costs nothing here",
    "prediction_loss_only": "metrics need the predictions; leave it out and pass no compute_metrics",
    "label_names": "labels are what the model's forward pass takes as such; leave it out and rename the column",
    "eval_do_concat_batches": "metrics take whole arrays; leave it out",
}
# Where there are second derivatives: in BiSSL with a solver that takes products with the curvature.
REFUSED_IN_SECOND_ORDER: dict[str, str] = {
    **dict.fromkeys(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"), f"{SECOND_ORDER}; {_FIRST_ORDER_WAY}"
    ),
    **dict.fromkeys(
        (
            *("activation_checkpointing", "activation_checkpointing_kwargs"),
            *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
        ),
        "a graph that is computed again has no second derivative; set micro-batches and curvature_mode='recompute', "
        "or take a first-order solver (mfac, identity, none)",
    ),
}
REFUSED_IN_PRETRAINING: dict[str, str] = {"label_smoothing_factor": _NO_LABELS}
REFUSED_IN_JOINT_TRAINING: dict[str, str] = dict.fromkeys(
    ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "a step of joint training runs one backbone in two models, which are not compiled; leave it out",
)
# What BiSSL takes from its alternations.
REFUSED_BY_ALTERNATIONS: dict[str, str] = {
    "max_steps": "the length of a run is num_alternations x (lower_steps + upper_steps). Leave max_steps out",
    "num_train_epochs": "one epoch is one alternation. Leave num_train_epochs out",
}


def is_set(value: Any, default: Any) -> bool:
    """Whether a field has another value than its default; empty values and `"no"` are the same."""
    nothing = value in (None, False, "", "no", 0) or value == [] or value == {}
    return bool(value != default) and not (nothing and default in (None, False, "", "no"))


def refuse_fields(args: TrainingArguments, refused: Mapping[str, str]) -> None:
    """Refuses fields that do not have their default values.

    Args:
        args (`TrainingArguments`)
        refused (`Mapping[str, str]`): the reason and the way out, by field.

    Raises:
        `ValueError`: with the field, its value, the reason and what to do. Secrets are not repeated.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in refused.items():
        value = getattr(args, name)
        if is_set(value, defaults[name]):
            shown = "set" if name == "hub_token" else repr(value)
            raise ValueError(f"{name} is {shown}, which is not supported: {reason}.")
