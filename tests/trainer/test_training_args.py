"""The arguments: defaults of the paper, ranges, and what is refused."""

import dataclasses

import pytest
import torch
from transformers import HfArgumentParser

from bissl_hf import BiSSLTrainingArguments
from bissl_hf.trainer.resumable_args import ResumableTrainingArguments
from bissl_hf.trainer.training_args import FineTuningArguments, PretextTrainingArguments


def make_args(**overrides) -> BiSSLTrainingArguments:
    return BiSSLTrainingArguments(**{"output_dir": "unused", "use_cpu": True, "report_to": "none", **overrides})


def test_defaults_are_the_papers():
    args = make_args()
    expected = {
        "num_alternations": 500, "lower_steps": 20, "upper_steps": 8, "target_pull": 10.0,
        "proximal_weight": None, "damping": "auto", "curvature_kind": "hessian", "solver_memory": 20,
        "direct_weight": 0.01, "solver": "cg", "solver_max_iterations": 5, "head_warmup_epochs": 20,
        "lower_optim": "lars", "lower_learning_rate": 1.0, "lower_weight_decay": 1e-6, "lower_momentum": 0.9,
        "lower_max_grad_norm": 10.0, "per_device_lower_batch_size": 1024, "optim": "sgd", "learning_rate": 0.015,
        "weight_decay": 0.01, "max_grad_norm": 10.0, "per_device_train_batch_size": 256,
        "lr_scheduler_type": "cosine_with_min_lr", "upper_adaptation_every": 0, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in expected} == expected
    assert args.optimizer_options == {"momentum": 0.9}
    assert args.lower_optimizer_options == {"momentum": 0.9}
    assert args.lr_scheduler_kwargs == args.lower_lr_scheduler_kwargs == {"min_lr_rate": 0.001}


def test_the_papers_weight_comes_with_the_papers_damping():
    args = make_args(proximal_weight=0.001)
    assert (args.target_pull, args.proximal_weight, args.damping) == (None, 0.001, 10.0)
    assert make_args(proximal_weight=0.001, damping="auto").damping == "auto"
    assert make_args(damping="3.5").damping == 3.5


COUPLING = [
    ({"target_pull": 3.0, "proximal_weight": 0.1}, "target_pull is 3.0 and proximal_weight 0.1; the first finds"),
    ({"target_pull": 0.0}, "target_pull is 0.0; it must be a finite number above 0"),
    ({"damping": "much"}, "damping is 'much'; it must be a number or 'auto'"),
    ({"solver": "none", "direct_weight": 0.0}, "solver is 'none' and direct_weight 0"),
    ({"solver_memory": 0}, "solver_memory is 0; it must be a finite number of at least 1"),
    ({"curvature_kind": "fisher"}, "curvature_kind is 'fisher'; it must be one of hessian, gauss_newton"),
]


@pytest.mark.parametrize(("values", "message"), COUPLING)
def test_what_couples_the_levels_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        make_args(**values)


def test_pretext_defaults():
    args = PretextTrainingArguments(output_dir="unused", use_cpu=True)
    assert (args.optim, args.learning_rate, args.weight_decay) == ("lars", 4.8, 1e-6)
    assert (args.per_device_train_batch_size, args.max_grad_norm) == (1024, 0.0)


def test_one_epoch_is_one_alternation():
    args = make_args(num_alternations=7)
    assert args.num_train_epochs == 7.0
    assert make_args(num_alternations=7, num_train_epochs=7).num_train_epochs == 7.0
    assert (args.logging_strategy, args.eval_strategy, args.save_strategy) == ("epoch", "epoch", "epoch")
    assert args.save_total_limit == 2


def text_of(value) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, dict):
        return repr(value).replace("'", '"').replace("True", "true").replace("False", "false").replace("None", "null")
    return str(getattr(value, "value", value))


# It follows from another field.
DERIVED = {"num_train_epochs"}


def test_the_parser_takes_every_field():
    parser = HfArgumentParser(BiSSLTrainingArguments)
    known = {action.dest for action in parser._actions}
    fields = [field for field in dataclasses.fields(BiSSLTrainingArguments) if field.init]
    assert {field.name for field in fields} <= known
    default = BiSSLTrainingArguments(output_dir="unused", use_cpu=True)
    own = set(BiSSLTrainingArguments.__annotations__) | set(ResumableTrainingArguments.__annotations__)
    words = ["--output_dir", "unused", "--use_cpu", "true"]
    for name in sorted((own & {field.name for field in fields}) - DERIVED):
        value = getattr(default, name)
        if value is not None:
            words += [f"--{name}", text_of(value)]
    (parsed,) = parser.parse_args_into_dataclasses(words)
    for name in own - DERIVED:
        assert getattr(parsed, name) == getattr(default, name), name


def test_the_parser_takes_values_that_default_to_nothing():
    words = (
        "--output_dir unused --use_cpu true --lower_optim_args exclude_bias_and_norm=True --curvature_batch_size 5 "
        '--lower_micro_batch_size 3 --upper_micro_batch_size 2 --lower_lr_scheduler_kwargs {"min_lr_rate":0.5}'
    )
    (args,) = HfArgumentParser(BiSSLTrainingArguments).parse_args_into_dataclasses(words.split())
    assert args.lower_optimizer_options == {"exclude_bias_and_norm": True, "momentum": 0.9}
    assert (args.curvature_batch_size, args.lower_micro_batch_size, args.upper_micro_batch_size) == (5, 3, 2)
    assert args.lower_lr_scheduler_kwargs == {"min_lr_rate": 0.5}


def test_momentum_only_where_the_optimizer_has_one_and_options_win():
    args = make_args(optim="adamw", lower_optim="adam", lower_lr_scheduler_type="constant")
    assert args.optimizer_options == args.lower_optimizer_options == {}
    assert args.lower_lr_scheduler_kwargs is None
    args = make_args(optim_args="momentum=0.5", lower_optim="sgd", lower_momentum=0.3)
    assert (args.optimizer_options, args.lower_optimizer_options) == ({"momentum": 0.5}, {"momentum": 0.3})
    assert args.optim == "sgd"


def test_warm_up_is_a_fraction_or_a_number_of_steps():
    settings = {"num_alternations": 5, "lower_steps": 6}
    assert make_args(**settings, lower_warmup_steps=0.2).get_lower_warmup_steps() == 6
    assert make_args(**settings, lower_warmup_steps=4).get_lower_warmup_steps() == 4
    assert make_args(**settings, lower_warmup_steps=30).get_lower_warmup_steps() == 30


def test_the_key_is_seeded_by_data_seed_where_there_is_one():
    assert make_args(seed=3).key_seed == 3
    assert make_args(seed=3, data_seed=4).key_seed == 4


OUT_OF_RANGE = [
    *[(name, 0) for name in ("num_alternations", "lower_steps", "upper_steps", "solver_max_iterations")],
    *[(name, 0) for name in ("per_device_lower_batch_size", "per_device_train_batch_size", "curvature_batch_size")],
    *[(name, 0) for name in ("lower_micro_batch_size", "upper_micro_batch_size", "per_device_eval_batch_size")],
    *[(name, -1.0) for name in ("damping", "direct_weight", "solver_tolerance", "lower_weight_decay")],
    *[(name, -1) for name in ("head_warmup_epochs", "bn_recalibration_images", "upper_adaptation_every")],
    *[(name, -1) for name in ("weight_decay", "lower_warmup_steps", "warmup_steps")],
    *[(name, float("nan")) for name in ("lower_max_grad_norm", "max_grad_norm", "damping")],
    *[(name, float("inf")) for name in ("damping", "direct_weight", "weight_decay")],
    *[(name, -1) for name in ("dataloader_timeout", "ddp_timeout", "save_steps", "logging_steps")],
    *[(name, float("nan")) for name in ("eval_steps", "eval_delay")],
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_values_below_their_bound_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}; it must be a finite number of at least [01]\."):
        make_args(**{name: value})


@pytest.mark.parametrize("name", ["proximal_weight", "learning_rate", "lower_learning_rate"])
@pytest.mark.parametrize("value", [0, -0.1, float("inf"), float("nan")])
def test_values_that_must_be_positive(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}; it must be a finite number above 0"):
        make_args(**{name: value})


@pytest.mark.parametrize("name", ["lower_momentum", "upper_adaptation_strength"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_values_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {value}; it must be between 0 and 1"):
        make_args(**{name: value})


REFUSED = [
    ({"solver": "lu"}, "solver is 'lu'; it must be one of cg, recycled, blockwise_cg, mfac, identity, none"),
    ({"curvature_mode": "eager"}, "curvature_mode is 'eager'; it must be one of auto, cached, recompute"),
    ({"solver": "blockwise_cg", "solver_tolerance": 0.1}, "solver_tolerance is 0.1, and solver 'blockwise_cg' has no"),
    ({"num_train_epochs": 3}, "num_train_epochs is 3 and num_alternations 500; one epoch is one alternation"),
    ({"max_steps": 5}, "max_steps is 5; the length of a run is num_alternations x"),
    ({"num_alternations": 2, "lower_steps": 3, "lower_warmup_steps": 7}, "lower_warmup_steps is 7; a run has 6"),
    ({"lower_gradient_cache": True}, "lower_gradient_cache is on, and lower_micro_batch_size is not set"),
    ({"hub_token": "secret"}, "hub_token is set, which is not supported: it would be written in clear"),
    (
        {"gradient_accumulation_steps": 2},
        "gradient_accumulation_steps is 2, which is not supported: it must be 1.* lower_micro_batch_size",
    ),
    ({"torch_compile": True}, "torch_compile is True, which is not supported: a compiled graph has no second deriv"),
    ({"auto_find_batch_size": True}, "auto_find_batch_size is True, which is not supported: .*; "),
    ({"save_only_model": True}, "save_only_model is True, which is not supported: .*; "),
    ({"dataloader_drop_last": True}, "dataloader_drop_last is True, which is not supported: .*; "),
    ({"prediction_loss_only": True}, "prediction_loss_only is True, which is not supported: .*; "),
    ({"label_names": ["y"]}, r"label_names is \['y'\], which is not supported: .*rename the column"),
    ({"eval_do_concat_batches": False}, "eval_do_concat_batches is False, which is not supported"),
    ({"fsdp": "full_shard"}, "fsdp is 'full_shard', which is not supported: .* use plain data parallelism"),
    ({"deepspeed": "zero.json"}, "deepspeed is 'zero.json', .* use plain data parallelism"),
    ({"optim": "sgdd"}, "optim is 'sgdd'; it must be one of .*lars"),
    ({"lower_optim": "lbfgs"}, "lower_optim is 'lbfgs'; it must be one of .*lars"),
    ({"optim_args": "0.9"}, "optim_args is '0.9'; it must read like"),
    ({"lower_optim_args": "momentum"}, "lower_optim_args is 'momentum'; it must read like"),
    ({"lr_scheduler_type": "zigzag"}, "lr_scheduler_type is 'zigzag'; it must be one of .*cosine"),
    ({"lower_lr_scheduler_type": "zigzag"}, "lower_lr_scheduler_type is 'zigzag'; it must be one of .*cosine"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type is 'reduce_lr_on_plateau', which follows a"),
    ({"lower_lr_scheduler_kwargs": "{"}, r"lower_lr_scheduler_kwargs is '\{'; it must be a JSON object"),
    ({"lower_lr_scheduler_kwargs": "[1]"}, r"lower_lr_scheduler_kwargs is '\[1\]'; it must be a JSON object"),
    (
        {"lower_lr_scheduler_kwargs": '{"min_lr_rate": NaN}'},
        "lower_lr_scheduler_kwargs is .*NaN is no number of JSON",
    ),
    ({"lr_scheduler_kwargs": {"min_lr_rate": float("inf")}}, "lr_scheduler_kwargs has min_lr_rate = inf; it must"),
    ({"lower_lr_scheduler_kwargs": {"bend": 1}}, "lower_lr_scheduler_type is 'cosine_with_min_lr' with the options"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        make_args(**overrides)


def test_the_secret_is_not_repeated_in_the_message():
    with pytest.raises(ValueError, match="HF_TOKEN") as caught:
        make_args(hub_token="hf_secret")
    assert "hf_secret" not in str(caught.value)


def test_refusals_come_before_anything_is_set_up(tmp_path):
    with pytest.raises(ValueError, match="solver"):
        make_args(output_dir=str(tmp_path / "run"), solver="lu")
    assert not (tmp_path / "run").exists()


def test_bf16_is_allowed_on_a_cpu():
    assert make_args(bf16=True).bf16
    assert torch.device(make_args().device).type == "cpu"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_norm": "frozen"}, "batch_norm is 'frozen'; it must be one of running, recalibrated"),
        (
            {"bn_recalibration_images": 0, "batch_norm": "recalibrated"},
            "bn_recalibration_images is 0; it must be a finite number of at least 1",
        ),
        ({"bn_recalibration_images": -1}, "bn_recalibration_images is -1; it must be a finite number of at least 0"),
        ({"learning_rate": -0.1}, r"learning_rate is -0.1; it must be a finite number of at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_fine_tuning_refuses(overrides, message):
    with pytest.raises(ValueError, match=message):
        FineTuningArguments(output_dir="unused", use_cpu=True, **overrides)


def test_the_papers_values_are_the_defaults_of_the_other_stages():
    pretext = PretextTrainingArguments(output_dir="unused", use_cpu=True)
    assert (pretext.optim, pretext.learning_rate, pretext.weight_decay) == ("lars", 4.8, 1e-6)
    assert (pretext.num_train_epochs, pretext.per_device_train_batch_size) == (600, 1024)
    assert pretext.get_warmup_steps(600 * 97) == 10 * 97
    tuning = FineTuningArguments(output_dir="unused", use_cpu=True)
    assert (tuning.optim, tuning.optimizer_options, tuning.lr_scheduler_type) == ("sgd", {"momentum": 0.9}, "cosine")
    assert (tuning.num_train_epochs, tuning.per_device_train_batch_size) == (400, 256)
