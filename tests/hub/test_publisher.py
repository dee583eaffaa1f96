"""What the trainers push, when, and what happens when the Hub does not take it."""

import json
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from huggingface_hub import CommitInfo, ModelCard
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, TrainerCallback

from bissl_hf import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments, SimCLRForPreTraining
from bissl_hf.checkpoints import find_defect, find_last_checkpoint
from bissl_hf.cli.models import PretextModelArguments, build_pretext_model
from bissl_hf.cli.outputs import open_output_dir
from bissl_hf.data.augment import image_processor
from bissl_hf.hub import process as hub_process
from bissl_hf.hub.folder import fetch_last_checkpoint
from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import PretextTrainingArguments

from ..conftest import TinyImages, tiny_model
from ..hub_stand_in import FAULTS, OTHER_TOKEN, READ_ONLY_TOKEN, TOKEN, HubStandIn

CHECKPOINT_FILES = {
    "config.json", "manifest.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "run_state.json",
    "scheduler.pt", "trainer_state.json",
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_process, "PATIENCE_SECONDS", 3.0)
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        yield hub


def make_pretext_trainer(output_dir: Path, **overrides) -> PretextTrainer:
    """Four steps with a save after the second."""
    args = PretextTrainingArguments(
        **{
            "output_dir": str(output_dir),
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 0.1,
            "use_cpu": True,
            "disable_tqdm": True,
            "push_to_hub": True,
            "hub_strategy": "checkpoint",
            **overrides,
        }
    )
    return PretextTrainer(tiny_model().lower, args, train_dataset=TinyImages(20, pairs=True))


def make_bissl_trainer(output_dir: Path, *, scores: Sequence[float] = (), **overrides) -> BiSSLTrainer:
    """Two alternations of two lower and two upper steps, with a save after each. With scores: three alternations, of
    which the one with the highest score is the best."""
    scripted: dict[str, Any] = {}
    if scores:
        answers = iter([value for score in scores for value in (score, 0.0)])  # the upper model is evaluated second
        scripted = {"eval_dataset": TinyImages(6), "compute_metrics": lambda prediction: {"score": next(answers)}}
        overrides |= {"num_alternations": 3, "eval_strategy": "epoch", "load_best_model_at_end": True,
                      "metric_for_best_model": "score", "greater_is_better": True}  # fmt: skip
    args = BiSSLTrainingArguments(
        **{
            "output_dir": str(output_dir),
            "num_alternations": 2,
            "lower_steps": 2,
            "upper_steps": 2,
            "per_device_lower_batch_size": 8,
            "per_device_train_batch_size": 8,
            "proximal_weight": 30.0,
            "damping": 500.0,
            "lower_learning_rate": 0.01,
            "head_warmup_epochs": 1,
            "eval_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "push_to_hub": True,
            "hub_strategy": "checkpoint",
            **overrides,
        }
    )
    model = tiny_model()
    model.upper.config.id2label = dict(enumerate(("cat", "dog", "emu")))
    return BiSSLTrainer(
        model, args, train_dataset=TinyImages(24), lower_dataset=TinyImages(24, pairs=True),
        processing_class=image_processor(8), **scripted,
    )  # fmt: skip


def folder_of(files: dict[str, bytes], name: str) -> set[str]:
    return {path.removeprefix(f"{name}/") for path in files if path.startswith(f"{name}/")}


def same_weights(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    others = second.state_dict()
    return all(value.equal(others[name]) for name, value in first.state_dict().items())


# What lies there


def test_others_load_the_aligned_model_with_its_labels_and_go_on_with_both_levels(hub, tmp_path):
    trainer = make_bissl_trainer(tmp_path / "aligned")
    trainer.train()
    files = hub.files("user/aligned")
    assert folder_of(files, "last-checkpoint") == CHECKPOINT_FILES | {"preprocessor_config.json"}
    native = AutoModelForImageClassification.from_pretrained("user/aligned")
    assert same_weights(native, trainer.aligned_model())
    assert native.config.id2label == {0: "cat", 1: "dog", 2: "emu"}
    assert same_weights(BiSSLModel.from_pretrained("user/aligned", subfolder="bilevel"), trainer.model)
    assert AutoModel.from_pretrained("user/aligned").config.hidden_sizes == [4, 4]
    assert files["preprocessor_config.json"] == files["last-checkpoint/preprocessor_config.json"]
    image = Image.fromarray(np.zeros((9, 9, 3), dtype=np.uint8)).convert("L")
    processor = type(trainer.processing_class).from_pretrained("user/aligned")
    assert processor(image, return_tensors="pt")["pixel_values"].shape[-2:] == (8, 8)
    assert ModelCard.load("user/aligned").data.base_model is None
    assert "user/aligned" in files["README.md"].decode()


def test_a_user_pushes_as_with_any_trainer(hub, tmp_path):
    trainer = make_pretext_trainer(tmp_path / "simclr", push_to_hub=False, save_strategy="no")
    trainer.train()
    assert hub.repositories == {}
    commit = trainer.push_to_hub("My message", private=True, revision="branch")
    assert isinstance(commit, CommitInfo)
    assert (commit.oid, commit.commit_message) == (hub.commits("user/simclr", branch="branch")[-1].oid, "My message")
    assert hub.repositories["model", "user/simclr"].private
    assert set(hub.files("user/simclr")) == {".gitattributes"}
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.files("user/simclr", branch="branch"))
    assert trainer.push_to_hub(blocking=False).result().commit_message == "End of training"
    hub.fail("500", path="/commit/")
    (tmp_path / "simclr" / "notes.txt").write_text("new")
    with pytest.raises(
        RuntimeError, match=r"it answered 500.*Not there yet: the model\. .*\n    hf upload user/simclr"
    ):
        trainer.push_to_hub()


def test_a_pretext_model_serves_as_lower_model_by_its_name(hub, tmp_path):
    trainer = make_pretext_trainer(tmp_path / "simclr", hub_model_id="user/other", hub_private_repo=True)
    trainer.train()
    trainer.push_to_hub()
    assert hub.repositories["model", "user/other"].private
    loaded = build_pretext_model(PretextModelArguments(lower_model="user/other"))
    assert same_weights(loaded, trainer.model)
    assert same_weights(SimCLRForPreTraining.from_pretrained("user/other"), trainer.model)


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [
        ("end", set()),
        ("every_save", set()),
        ("checkpoint", {"last-checkpoint"}),
        ("all_checkpoints", {"checkpoint-2", "checkpoint-4"}),
    ],
)
def test_each_strategy_leaves_its_checkpoints(hub, tmp_path, strategy, folders):
    trainer = make_pretext_trainer(tmp_path / "run", hub_strategy=strategy, save_total_limit=1)
    trainer.train()
    files = hub.files("user/run")
    assert ("model.safetensors" in files) == (strategy != "end")
    trainer.push_outputs()
    files = hub.files("user/run")
    assert {path.split("/")[0] for path in files if "/" in path} == folders
    for folder in folders:
        assert folder_of(files, folder) == CHECKPOINT_FILES
    assert not {"unpushed", ".pushing", ".staged"} & {path.name for path in (tmp_path / "run").iterdir()}


def test_no_pickle_of_arguments_and_no_token_leaves_the_machine(hub, tmp_path, caplog):
    output = tmp_path / "run"
    trainer = make_bissl_trainer(output, hub_strategy="all_checkpoints")
    trainer.train()
    trainer.save_model(output)
    (output / "notes.json").write_text(json.dumps({"token": TOKEN}))
    (output / "all_results.json").write_text("{}")
    (output / "training_args.bin").write_bytes(pickle.dumps(trainer.args))
    (output / ".env").write_text(TOKEN)
    for name in ("README.md", "README.new-1.md", "notes.md"):
        (output / name).write_text("# Mine")
    (output / "private").mkdir()
    (output / "private" / "key.json").write_text("{}")
    trainer.push_outputs()
    files = hub.files("user/run")
    assert "all_results.json" in files
    suffixes = {Path(path).suffix for path in files if "/" not in path or path.startswith("bilevel")}
    assert suffixes <= {"", ".json", ".safetensors", ".md"}
    assert not [path for path in files if "training_args" in path or "key" in path or "env" in path]
    assert [path for path in files if path.endswith(".md")] == ["README.md"]
    assert not [request.line for request in hub.requests if TOKEN.encode() in request.body]
    assert f"{output / 'notes.json'} holds a token of the Hub and is not pushed" in caplog.text
    for path, content in files.items():
        if path.endswith((".pt", ".pth")):
            (tmp_path / "read").write_bytes(content)
            torch.load(tmp_path / "read", weights_only=path.endswith(".pt"))


def test_pushing_does_not_change_the_run(hub, tmp_path):
    trainers = [make_bissl_trainer(tmp_path / str(push), push_to_hub=push) for push in (True, False)]
    for trainer in trainers:
        trainer.train()
    assert same_weights(trainers[0].model, trainers[1].model)


# Going on from it


class Stop(TrainerCallback):
    """Ends the training with a save."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step == self.step


@pytest.mark.parametrize("make", [make_bissl_trainer, make_pretext_trainer])
def test_a_run_goes_on_from_the_hub_alone_to_the_bit(hub, tmp_path, make):
    whole = make(tmp_path / "whole", push_to_hub=False)
    whole.train()
    first = make(tmp_path / "first" / "run")
    first.add_callback(Stop(3))
    first.publisher.resume_files = ("before.json", "pretraining/model")
    (tmp_path / "first" / "run" / "pretraining" / "model").mkdir(parents=True)
    (tmp_path / "first" / "run" / "pretraining" / "model" / "config.json").write_text("{}")
    (tmp_path / "first" / "run" / "before.json").write_text('{"a": 1}')
    first.train()
    shutil.rmtree(tmp_path / "first")

    output = tmp_path / "second" / "run"
    checkpoint = open_output_dir(str(output), "hub")
    assert checkpoint == output / "checkpoint-3"
    assert json.loads((output / "before.json").read_text()) == {"a": 1}
    assert (output / "pretraining" / "model" / "config.json").is_file()
    assert open_output_dir(str(output), "hub", repo_id="user/nowhere") == checkpoint
    second = make(output)
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.global_step == whole.state.global_step
    assert same_weights(second.model, whole.model)
    ends = [
        {name: value for name, value in trainer.state.log_history[-2].items() if "second" not in name}
        for trainer in (whole, second)
    ]
    assert ends[0] == ends[1]
    assert "loss" in ends[0]


def test_the_best_model_is_loaded_at_the_end_by_a_run_that_goes_on_from_the_hub(hub, tmp_path):
    whole = make_bissl_trainer(tmp_path / "whole", scores=[3.0, 1.0, 2.0], push_to_hub=False)
    whole.train()
    first = make_bissl_trainer(tmp_path / "first" / "run", scores=[3.0, 1.0])
    first.add_callback(Stop(8))
    first.train()
    assert not [path for path, content in hub.files("user/run").items() if str(tmp_path).encode() in content]
    shutil.rmtree(tmp_path / "first")
    output = tmp_path / "second" / "run"
    checkpoint = open_output_dir(str(output), "hub")
    assert (checkpoint, find_defect(output / "checkpoint-4")) == (output / "checkpoint-8", None)
    second = make_bissl_trainer(output, scores=[2.0])
    second.train(resume_from_checkpoint=str(checkpoint))
    assert second.state.best_model_checkpoint == str(output / "checkpoint-4")
    assert same_weights(second.model, whole.model)
    assert same_weights(second.model, BiSSLModel.from_pretrained(output / "checkpoint-4"))


def test_a_run_starts_where_the_hub_has_no_checkpoint(hub, tmp_path, capsys):
    assert open_output_dir(str(tmp_path / "run"), "hub") is None
    assert "The Hub has no checkpoint of run yet: the run starts from its beginning." in capsys.readouterr().err
    hub.add_repository("user/run", {"config.json": "{}"})
    assert fetch_last_checkpoint("user/run", tmp_path / "run") is None


def test_a_checkpoint_that_cannot_be_had_is_no_reason_to_start_anew(hub, tmp_path):
    hub.add_repository("user/run", {"last-checkpoint/trainer_state.json": "{}"})
    with pytest.raises(ValueError, match="The last-checkpoint/ of user/run is not whole: it has no manifest"):
        fetch_last_checkpoint("user/run", tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    hub.fail("500")
    with pytest.raises(OSError, match="The Hub does not give the last-checkpoint/ of run: it answered 500"):
        open_output_dir(str(tmp_path / "run"), "hub")
    hub.recover()
    hub.fail("403")
    with pytest.raises(ValueError, match="The Hub does not give the last-checkpoint/ of run: it answered 403"):
        open_output_dir(str(tmp_path / "run"), "hub")


class Harm:
    """Runs code when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_code_in_a_checkpoint_of_others_is_not_run(hub, tmp_path, name):
    first = make_pretext_trainer(tmp_path / "run")
    first.train()
    files = hub.files("user/run")
    torch.save(Harm(tmp_path / "witness"), tmp_path / "harm")
    files[f"last-checkpoint/{name}"] = (tmp_path / "harm").read_bytes()
    manifest = json.loads(files["last-checkpoint/manifest.json"])
    content = files[f"last-checkpoint/{name}"]
    manifest["files"][name] = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128(content).hexdigest()}
    files["last-checkpoint/manifest.json"] = json.dumps(manifest).encode()
    checkpoint = fetch_last_checkpoint("user/run", tmp_path / "again")
    second = make_pretext_trainer(tmp_path / "again", max_steps=6, push_to_hub=False)
    with pytest.raises(ValueError, match=f"{name} holds more than tensors and numbers; it is not read"):
        second.train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "witness").exists()


def test_code_beside_a_model_is_not_run(hub, tmp_path):
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    code = f"open({str(tmp_path / 'witness')!r}, 'w')\n"
    hub.add_repository("user/own", {"config.json": json.dumps(config), "own.py": code})
    for name in ("lower_model", "backbone"):
        with pytest.raises(ValueError, match=f"{name} is 'user/own'; .* contains custom code"):
            build_pretext_model(PretextModelArguments(**{name: "user/own"}))
    assert not (tmp_path / "witness").exists()


# Faults


@pytest.mark.parametrize("token", [None, "hf_wrong", READ_ONLY_TOKEN, OTHER_TOKEN])
def test_a_token_that_cannot_push_is_found_before_training(hub, monkeypatch, tmp_path, token):
    hub.patch(monkeypatch, tmp_path / "home", token)
    with pytest.raises(ValueError, match=r"The Hub does not take pushes to user/run: .* Set HF_TOKEN to a token"):
        make_pretext_trainer(tmp_path / "run", hub_model_id="user/run")


class Fail(TrainerCallback):
    """Has the Hub fail, or recover, at a moment of the training."""

    def __init__(self, hub: HubStandIn, moment: str, fault: str | None, times: int | None = None) -> None:
        self.hub, self.moment, self.fault, self.times = hub, moment, fault, times

    def at(self, moment: str) -> None:
        if moment == self.moment and self.fault is None:
            self.hub.recover()
        elif moment == self.moment:
            self.hub.fail(self.fault, times=self.times)

    def on_train_begin(self, args, state, control, **kwargs):
        self.at("train begin")

    def on_step_end(self, args, state, control, **kwargs):
        self.at(f"step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.at("end")


def wait_for_push(trainer):
    """Training is so short here that a push would outlast it."""

    class Wait(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            while trainer.publisher.queue._upload is not None and trainer.publisher.queue._upload.running():
                time.sleep(0.02)

    trainer.add_callback(Wait())


ONCE = [("500", 1)]
ALWAYS = [(fault, None) for fault in FAULTS]
QUICK = [("500", 1)]


def fault_cases(moments: list[str]):
    for moment in moments:
        for fault, times in ONCE + ALWAYS:
            quick = (fault, times) in QUICK or (moment, fault) == ("save", "hang")
            yield pytest.param(moment, fault, times, id=f"{moment}-{fault}{'-once' if times else ''}",
                               marks=[] if quick else [pytest.mark.slow])  # fmt: skip


@pytest.mark.parametrize(("moment", "fault", "times"), list(fault_cases(["before", "save", "end"])))
def test_training_ends_and_loses_nothing(hub, tmp_path, capsys, caplog, moment, fault, times):
    """A fault that begins at a moment, and either passes with it or stays until the end."""
    output = tmp_path / "run"
    if moment == "before":
        hub.fail(fault, times=times)
        if fault in ("401", "403"):
            with pytest.raises(ValueError, match=f"it answered {fault}"):
                make_pretext_trainer(output)
            return
    trainer = make_pretext_trainer(output)
    wait_for_push(trainer)
    if moment == "save":
        trainer.add_callback(Fail(hub, "step 2", fault, times))
    elif moment == "end":
        trainer.add_callback(Fail(hub, "step 4", fault, times))
    trainer.train()

    assert trainer.state.global_step == 4
    checkpoint, passed_over = find_last_checkpoint(output)
    assert (checkpoint, passed_over) == (output / "checkpoint-4", {})
    told = capsys.readouterr().err
    everything_there = times is not None and not (moment == "end" and "Not there yet" in told)
    assert told.count("Not there yet") == (0 if everything_there else 1)
    assert caplog.text.count("takes no push") <= 1
    if not everything_there:
        command = re.search(r"\n    (hf upload .*)\n", told)[1].split()
        hub.recover()
        hf = [sys.executable, "-c", "from huggingface_hub.cli.hf import main; main()", *command[1:]]
        done = subprocess.run(hf, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    files = hub.files("user/run")
    assert folder_of(files, "last-checkpoint") == CHECKPOINT_FILES
    for name in CHECKPOINT_FILES:
        assert files[f"last-checkpoint/{name}"] == (checkpoint / name).read_bytes()
    assert same_weights(SimCLRForPreTraining.from_pretrained("user/run"), trainer.model)


def test_a_hub_that_hangs_is_given_up_until_one_more_try_at_the_end(hub, tmp_path, caplog, capsys):
    trainer = make_pretext_trainer(tmp_path / "run", max_steps=8)
    wait_for_push(trainer)
    trainer.add_callback(Fail(hub, "step 2", "hang"))
    trainer.train()
    assert len([request for request in hub.requests if request.status == "hang"]) == 2
    assert caplog.text.count("it made no progress for 3 seconds. The run goes on") == 1
    assert capsys.readouterr().err.count("Not there yet: the model, last-checkpoint/. Everything is on disk") == 1


def test_a_save_is_pushed_although_the_one_before_failed(hub, tmp_path, capsys):
    trainer = make_pretext_trainer(tmp_path / "run", hub_strategy="all_checkpoints", save_total_limit=1)
    wait_for_push(trainer)
    hub.fail("500", path="/commit/", times=1)
    trainer.train()
    assert [commit.message for commit in hub.commits("user/run")][1:] == ["Training in progress, step 4"]
    assert {"checkpoint-2/model.safetensors", "checkpoint-4/model.safetensors"} <= set(hub.files("user/run"))
    assert capsys.readouterr().err.count("Not there yet") == 0


def test_a_run_that_was_killed_leaves_its_push_to_the_next(hub, tmp_path):
    trainer = make_pretext_trainer(tmp_path / "run", hub_strategy="all_checkpoints")
    hub.fail("500", path="/commit/")
    trainer.train()
    trainer.publisher.queue.unpushed.replace(
        tmp_path / "run" / ".pushing"
    )  # as if the process had died during the push
    hub.recover()
    checkpoint = open_output_dir(str(tmp_path / "run"), "true")
    again = make_pretext_trainer(tmp_path / "run", hub_strategy="all_checkpoints", max_steps=6)
    again.train(resume_from_checkpoint=str(checkpoint))
    folders = {path.split("/")[0] for path in hub.files("user/run") if "/" in path}
    assert folders == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
