"""What a study may say, and how its arms are matched."""

import json

import pytest

from bissl_hf.cli.images import ViewArguments
from bissl_hf.study.arms import LABELLED_BATCH
from bissl_hf.study.plan import Plan, StudyArguments
from bissl_hf.trainer.training_args import JointTrainingArguments

CONVENTIONAL = {"name": "plain", "kind": "conventional"}
BISSL = {"name": "ours", "kind": "bissl"}
JOINT = {"name": "both", "kind": "joint"}


def plan(**changes) -> Plan:
    settings = {"arms": [CONVENTIONAL, BISSL], "bissl": {"num_alternations": 6, "lower_steps": 5}, **changes}
    return Plan(StudyArguments(output_dir="unused", **settings), ViewArguments())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds is 0; it must be at least 1"),
        ({"pretrain_steps": 0}, "pretrain_steps is 0; it must be at least 1"),
        ({"search_trials": -1}, "search_trials is -1; it must be at least 0"),
        ({"datasets": ["digits", "digits"]}, "datasets is .* it must name at least one, each once"),
        ({"train_examples": []}, "train_examples is .* it must name at least one, each once"),
        ({"train_examples": [1]}, "train_examples is .* each must be at least 2"),
        ({"validation_examples": 1}, "validation_examples is 1; it must be at least 2"),
        ({"search_learning_rate": [1.0, 0.1]}, "The range of learning_rate is"),
        ({"arms": [BISSL]}, "arms are ours, and none is of the kind conventional"),
        ({"arms": [BISSL, {**CONVENTIONAL, "match": "wall_clock"}]}, "arms are ours, plain, and none .* by steps"),
        ({"arms": [CONVENTIONAL, {**BISSL, "name": "plain"}]}, "Several arms are named 'plain'"),
        ({"arms": [{**CONVENTIONAL, "kind": "both"}]}, "The kind of the arm plain is 'both'; it must be one of"),
        ({"arms": [{**CONVENTIONAL, "match": "epochs"}]}, "The match of the arm plain is 'epochs'"),
        ({"arms": [{**CONVENTIONAL, "match": "wall_clock"}]}, "is for an arm beside a BiSSL arm"),
        (
            {"arms": [{**CONVENTIONAL, "match": "rows"}]},
            "The match of the arm plain is 'rows'; it must be one of st",
        ),
        (
            {"arms": [CONVENTIONAL, BISSL, {**JOINT, "match": "wall_clock"}]},
            "The match of the joint arm both is 'wall_clock', at the pace of another joint arm; add one",
        ),
        (
            {"arms": [CONVENTIONAL, BISSL, {**JOINT, "match": "rows", "overrides": {LABELLED_BATCH: 4}}]},
            "The arm both sets per_device_labelled_batch_size, which its match 'rows' decides",
        ),
        (
            {"arms": [CONVENTIONAL, BISSL, {**CONVENTIONAL, "name": "l", "match": "wall_clock", "search": [{}]}]},
            "The arm l has a search and the match 'wall_clock', under which it takes the setting of another arm",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": {"upper_steps": 8}}]},
            "The search of arm ours sets upper_steps to 8; it must be a list of values",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": "cg"}]},
            "The search of arm ours is 'cg'; it must hold a list of values for each field, or a list of settings",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": {"upper_steps": [8, 8]}}]},
            "The search of arm ours is .*, which tries a setting twice; name each once",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": {"upper_step": [8]}}]},
            "the search of arm ours sets 'upper_step', which BiSSLTrainingArguments does not have",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": {"solver": ["cg", "lu"]}}]},
            "arm ours-try2: solver is 'lu'; it must be one of",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": {"upper_steps": [4, 8]}}, JOINT]},
            r"The arms try different numbers of settings \(ours 2, both 0\); give the same number to each",
        ),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "search": {"upper_steps": [4]}}, {**BISSL, "name": "ours-try1"}]},
            "Several arms are named 'ours-try1'",
        ),
        ({"rival": "other"}, "rival is 'other'; it must be one of the arms plain, ours"),
        ({"seeds": 1001}, "seeds is 1001; it must be at most 1000, where choice_seeds begin"),
        ({"search_once": True, "search_trials": 0}, "search_once is true and search_trials is 0; there is no search"),
        ({"choice_seeds": 0}, "choice_seeds is 0; it must be at least 1"),
        ({"curve_every": -1}, "curve_every is -1; it must be at least 0"),
        ({"pretrain": {"max_steps": 5}}, "pretrain sets max_steps, which the study sets by itself"),
        ({"arms": [{**CONVENTIONAL, "solver": "cg"}]}, "An arm has the unknown field 'solver'; it may have name"),
        ({"arms": [{"name": "plain"}]}, "has no field 'kind'"),
        ({"arms": [{**CONVENTIONAL, "name": "a/b"}]}, "An arm is named 'a/b'; use letters"),
        ({"arms": [{**CONVENTIONAL, "overrides": 3}]}, "overrides of the arm plain is 3"),
        ({"arms": ["plain"]}, "An arm is 'plain'; it must hold"),
        ({"bissl": "lambda"}, "bissl is 'lambda'; it must hold"),
        ({"bissl": {"lambda": 1}}, "bissl sets 'lambda', which BiSSLTrainingArguments does not have"),
        ({"arms": [CONVENTIONAL, {**BISSL, "overrides": {"solver": "lu"}}]}, "solver is 'lu'; it must be one of"),
        ({"finetune": {"seed": 3}}, "finetune sets seed, which the study sets by itself"),
        ({"pretrain": {"learning_rate": -1.0}}, "pretrain: learning_rate is -1.0"),
        ({"pretrain": {"num_train_epochs": 5}}, "pretrain sets num_train_epochs, which the study sets by itself"),
        ({"bissl": {"num_train_epochs": 5}}, "bissl sets num_train_epochs, which the study sets by itself"),
        (
            {"finetune": {"weight_decay": 0.1}},
            "finetune sets weight_decay, which the search chooses; leave it out",
        ),
        (
            {"arms": [{**CONVENTIONAL, "name": "pretrain"}]},
            "An arm is named 'pretrain', like the folder of the",
        ),
        ({"datasets": ["img", "img/"]}, "datasets names 'img' and 'img/', whose parts would share a folder"),
        (
            {"bissl": {"lower_step": 1}},
            r"bissl sets 'lower_step', which .* does not have; did you mean lower_steps or",
        ),
        ({"bissl": {"per_device_lower_batch_size": 1}}, "bissl: per_device_lower_batch_size is 1; SimCLR compares"),
        ({"bissl": {"curvature_batch_size": 1}}, "bissl: curvature_batch_size is 1; SimCLR compares"),
        (
            {"bissl": {"per_device_lower_batch_size": 9, "lower_micro_batch_size": 4}},
            "bissl: lower_micro_batch_size is 4, which leaves a part of 1 image from per_device_lower_batch_size 9",
        ),
        ({"pretrain": {"per_device_train_batch_size": 1}}, "pretrain: per_device_train_batch_size is 1; SimCLR"),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "overrides": {"curvature_batch_size": 1}}]},
            "arm ours: curvature_batch_size is 1; SimCLR compares",
        ),
        ({"bissl": {"lower_steps": None}}, "bissl sets lower_steps to None; it must be a whole number"),
        ({"bissl": {"lower_steps": 2.5}}, "bissl sets lower_steps to 2.5; it must be a whole number"),
        ({"bissl": {"lower_steps": True}}, "bissl sets lower_steps to True; it must be a whole number"),
        ({"bissl": {"damping": "much"}}, "damping is 'much'; it must be a number"),
        ({"finetune": {"optim": ["sgd"]}}, r"finetune sets optim to \['sgd'\]; it must be text"),
        ({"finetune": {"bf16": "false"}}, "finetune sets bf16 to 'false'; it must be true or false"),
        ({"finetune": {"eval_strategy": False}}, "finetune sets eval_strategy to False; it must be text"),
        ({"pretrain": {"lr_scheduler_kwargs": 3}}, "must be `field: value` pairs or text or null"),
        (
            {"arms": [CONVENTIONAL, {**BISSL, "overrides": {"proximal_weight": [1]}}]},
            r"arm ours sets proximal_weight to \[1\]; it must be a number",
        ),
        (
            {"backbone": {"model_type": "resnet", "hidden_size": [4]}},
            r"backbone sets 'hidden_size', which a resnet does not have; did you mean hidden_sizes",
        ),
        (
            {"backbone": {"model_type": "resnett"}},
            r"^model_type of backbone is 'resnett'; .{,99}did you mean resnet",
        ),
        ({"backbone": {"depths": [1]}}, "model_type of backbone is 'None'; it must be one of transformers' types"),
    ],
    ids=str,
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_the_conventional_arm_takes_the_lower_steps_of_bissl():
    made = plan(
        use_cpu=True,
        bissl={
            "num_alternations": 6, "lower_steps": 5, "lower_learning_rate": 0.7, "lower_momentum": 0.8,
            "lower_warmup_steps": 0.2, "per_device_lower_batch_size": 32, "lower_max_grad_norm": 3.0, "bf16": True,
        },
        arms=[{**CONVENTIONAL, "overrides": {"weight_decay": 0.25}}, BISSL],
    )  # fmt: skip
    assert made.matched_steps == 30
    args = made.continue_arguments("unused", 4, made.baseline, 30)
    assert (args.max_steps, args.warmup_steps, args.seed) == (30, 6, 4)
    assert (args.learning_rate, args.weight_decay, args.max_grad_norm) == (0.7, 0.25, 3.0)
    assert args.per_device_train_batch_size == 32
    assert args.optimizer_options == {"momentum": 0.8}
    assert (args.bf16, args.fp16) == (True, False)
    assert made.continue_arguments("unused", 4, made.baseline, 60).warmup_steps == 12, "in proportion"


def test_joint_training_takes_the_lower_steps_and_the_labelled_batches_of_bissl():
    joint = {"name": "both", "kind": "joint", "overrides": {"downstream_weight": 0.5}}
    made = plan(
        bissl={"num_alternations": 6, "lower_steps": 5, "lower_learning_rate": 0.7, "per_device_train_batch_size": 9},
        arms=[CONVENTIONAL, BISSL, joint],
    )
    args = made.arm_arguments("unused", 4, made.study.compared[2], made.matched_steps)
    assert isinstance(args, JointTrainingArguments)
    assert (args.max_steps, args.learning_rate, args.downstream_weight) == (30, 0.7, 0.5)
    assert args.per_device_labelled_batch_size == 9


@pytest.mark.parametrize(("overrides", "warned"), [({"lower_steps": 3}, True), ({"solver": "identity"}, False)])
def test_an_arm_that_is_not_matched_is_told(overrides, warned, caplog):
    with caplog.at_level("WARNING", "bissl_hf.study.plan"):
        plan(
            bissl={"num_alternations": 6, "lower_steps": 5},
            arms=[CONVENTIONAL, BISSL, {"name": "other", "kind": "bissl", "overrides": overrides}],
        )
    message = "The arm other takes 18 lower steps, and arms matched by steps get 30 pretext steps"
    assert (message in caplog.text) == warned


def test_arms_are_read_from_mappings_and_from_json():
    arms = [json.dumps(CONVENTIONAL), {**BISSL, "overrides": {"solver": "identity"}}]
    made = plan(arms=arms)
    assert [arm.kind for arm in made.study.compared] == ["conventional", "bissl"]
    assert made.bissl_arguments("unused", 0, made.clock_arm).solver == "identity"
    assert made.bissl_arguments("unused", 0).solver == "cg"


def test_settings_on_which_no_result_depends_do_not_tell_parts_apart():
    first, second = plan(), plan(finetune={"save_strategy": "no"}, seeds=9)
    assert first.run_settings(first.baseline, "digits", 10, 0) == second.run_settings(second.baseline, "digits", 10, 0)
    other = plan(finetune={"max_grad_norm": 0.5})
    assert first.run_settings(first.baseline, "digits", 10, 0) != other.run_settings(other.baseline, "digits", 10, 0)


def test_numbers_may_be_text():
    """YAML reads 1e-3 as text."""
    numbers = {"proximal_weight": "1e-3", "num_alternations": "8", "lower_steps": 5.0, "lr_scheduler_type": "linear"}
    made = plan(bissl=numbers, arms=[CONVENTIONAL, {**BISSL, "overrides": {"damping": "1e-2"}}])
    args = made.bissl_arguments("unused", 0, made.clock_arm)
    found = [args.proximal_weight, args.num_alternations, args.lower_steps, args.damping]
    assert found == [0.001, 8, 5, 0.01]
    assert [type(value) for value in found] == [float, int, int, float]
    assert made.arm_settings(made.clock_arm, 0)["overrides"] == {"damping": 0.01}, "the same part as with the number"


def test_a_search_needs_optuna(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="The backend of search_trials is 'optuna', which is not installed"):
        plan()
    plan(search_trials=0, finetune={"learning_rate": 0.5})


def test_a_search_tries_all_combinations_in_their_order():
    made = plan(arms=[CONVENTIONAL, {**BISSL, "search": {"proximal_weight": [1, "1e-1"], "upper_steps": [2, 3]}}])
    ours = made.study.compared[1]
    assert [variant.name for variant in ours.variants] == [f"ours-try{number}" for number in (1, 2, 3, 4)]
    assert [tuple(variant.overrides.values()) for variant in ours.variants] == [(1, 2), (1, 3), (0.1, 2), (0.1, 3)]
    assert made.bissl_arguments("unused", 0, ours.variants[2]).proximal_weight == 0.1
    assert list(made.choice_seeds) == [1000, 1001]
    assert not plan().choice_seeds


def test_conventional_arms_choose_their_steps_or_do_without():
    searched = {**CONVENTIONAL, "name": "longer", "search": [{"max_steps": 30}, {"max_steps": 60}]}
    ours = {**BISSL, "search": {"upper_steps": [4, 8]}}
    made = plan(arms=[CONVENTIONAL, searched, ours], bissl={"num_alternations": 6, "lower_steps": 5})
    second = made.study.compared[1].variants[1]
    args = made.arm_arguments("unused", 0, second, made.matched_steps)
    assert (args.max_steps, args.warmup_steps) == (60, 6), "the warm-up in proportion"


def test_a_joint_arm_reads_as_many_labelled_images_as_the_upper_steps():
    bissl = {"num_alternations": 6, "lower_steps": 5, "upper_steps": 4, "per_device_train_batch_size": 8}
    made = plan(arms=[CONVENTIONAL, BISSL, {**JOINT, "match": "rows"}], bissl=bissl)
    matched = made.row_matched(made.study.compared[2], made.clock_arm)
    args = made.arm_arguments("unused", 0, matched, made.matched_steps)
    assert args.max_steps * args.per_device_labelled_batch_size == 210, "192 in whole batches of 30 steps"


def test_an_arm_that_gets_the_time_of_another_takes_the_setting_of_its_pace():
    clocked = {"name": "clock", "kind": "joint", "match": "wall_clock", "overrides": {"weight_decay": 0.5}}
    made = plan(arms=[CONVENTIONAL, BISSL, clocked, {**JOINT, "overrides": {"downstream_weight": 3.0}}])
    arm = made.study.compared[2]
    assert made.pace_arm(arm).name == "both"
    assert made.timed(arm, made.pace_arm(arm)).overrides == {"downstream_weight": 3.0, "weight_decay": 0.5}
    assert [each.name for each in made.ordered_arms] == ["plain", "ours", "both", "clock"]
