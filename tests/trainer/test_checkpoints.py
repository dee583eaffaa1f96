"""Checkpoints are whole or not there, and a run goes on from one as if it had not been interrupted."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from bissl_hf.trainer.checkpoints import (
    MANIFEST_NAME,
    STAGING_FOLDER,
    find_defect,
    find_last_checkpoint,
    list_checkpoints,
    publish,
    write_json,
    write_manifest,
)

from .test_bissl_trainer import make_text_trainer, make_trainer, same_tensors


def whole_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "inner").mkdir()
    (folder / "inner" / "state").write_text("x")
    write_manifest(folder)
    return folder


def test_a_manifest_lists_every_file_with_its_size(tmp_path):
    folder = whole_checkpoint(tmp_path / "checkpoint-1")
    assert json.loads((folder / MANIFEST_NAME).read_text()) == {"files": {"weights": 5, "inner/state": 1}}
    assert find_defect(folder) is None


DEFECTS = [
    (lambda folder: shutil.rmtree(folder), "it is not a folder"),
    (lambda folder: (folder / MANIFEST_NAME).unlink(), "it has no manifest.json, which is written last"),
    (lambda folder: (folder / MANIFEST_NAME).write_text("{"), "its manifest.json cannot be read"),
    (lambda folder: (folder / MANIFEST_NAME).write_text("[]"), "its manifest.json cannot be read"),
    (lambda folder: (folder / MANIFEST_NAME).write_text("{}"), "its manifest.json cannot be read"),
    (lambda folder: (folder / MANIFEST_NAME).write_bytes(b"\xff\xfe"), "its manifest.json cannot be read"),
    (lambda folder: (folder / "inner" / "state").unlink(), "inner/state is missing"),
    (lambda folder: (folder / "weights").write_bytes(b"123"), "weights has 3 bytes instead of 5"),
]


@pytest.mark.parametrize(("harm", "clause"), DEFECTS, ids=[clause for _, clause in DEFECTS])
def test_what_a_checkpoint_lacks(tmp_path, harm, clause):
    folder = whole_checkpoint(tmp_path / "checkpoint-1")
    harm(folder)
    assert find_defect(folder) == clause


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path):
    assert find_last_checkpoint(tmp_path / "nowhere") == (None, {})
    for number in (9, 10, 11, 100):
        whole_checkpoint(tmp_path / f"checkpoint-{number}")
    for other in ("checkpoint-x", "checkpoint-1-old", STAGING_FOLDER):
        (tmp_path / other).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (9, 10, 11, 100)]
    assert find_last_checkpoint(tmp_path) == (tmp_path / "checkpoint-100", {})
    (tmp_path / "checkpoint-100" / "weights").unlink()
    (tmp_path / "checkpoint-11" / MANIFEST_NAME).unlink()
    last, passed_over = find_last_checkpoint(tmp_path)
    assert last == tmp_path / "checkpoint-10"
    assert passed_over == {
        tmp_path / "checkpoint-100": "weights is missing",
        tmp_path / "checkpoint-11": "it has no manifest.json, which is written last",
    }


def test_json_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"b": 1, "a": 2})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"b": 1, "a": 2}


def test_publishing_replaces_a_checkpoint_of_the_same_step(tmp_path):
    final = whole_checkpoint(tmp_path / "checkpoint-1")
    staged = whole_checkpoint(tmp_path / STAGING_FOLDER / "checkpoint-1")
    (staged / "weights").write_bytes(b"new")
    publish(staged, final)
    assert (final / "weights").read_bytes() == b"new"
    assert list((tmp_path / STAGING_FOLDER).iterdir()) == []


def test_the_newest_checkpoints_stay(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="epoch", num_alternations=4, save_total_limit=2)
    trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-15", "checkpoint-20"]
    assert not (tmp_path / STAGING_FOLDER).exists()
    assert find_last_checkpoint(tmp_path) == (tmp_path / "checkpoint-20", {})


def test_a_checkpoint_whose_writing_failed_does_not_appear(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="epoch", num_alternations=2)
    original = trainer._save_optimizer_and_scheduler

    def fail_the_second_time(output_dir):
        if trainer.state.global_step > 5:
            raise OSError("No space left on device")
        original(output_dir)

    trainer._save_optimizer_and_scheduler = fail_the_second_time
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]
    assert find_defect(tmp_path / "checkpoint-5") is None
    resumed = make_trainer(tmp_path, save_strategy="epoch", num_alternations=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not (tmp_path / STAGING_FOLDER).exists()
    assert find_last_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", {})


def test_a_harmed_checkpoint_is_refused_and_the_newest_whole_one_named(tmp_path):
    settings = {"save_strategy": "epoch", "num_alternations": 3}
    make_trainer(tmp_path, **settings).train()
    harmed = tmp_path / "checkpoint-15"
    weights = harmed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"checkpoint-15 is not whole: model.safetensors has .*one is .*checkpoint-10"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(harmed))
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="there is no whole one beside it"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(harmed))


CHANGES = [
    ({"seed": 8}, "seed was 7 and is 8"),
    ({"per_device_lower_batch_size": 6}, "lower batch was 8 and is 6"),
    ({"per_device_train_batch_size": 4}, "upper batch was 5 and is 4"),
    ({"curvature_batch_size": 4}, "curvature batch was 8 and is 4"),
    ({"lower_steps": 4}, "lower steps was 3 and is 4"),
    ({"upper_steps": 3}, "upper steps was 2 and is 3"),
    ({"train_rows": 13}, "upper examples was 12 and is 13"),
    ({"lower_rows": 25}, "lower examples was 24 and is 25"),
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, save_strategy="steps", save_steps=4, num_alternations=2, save_total_limit=None).train()
    return folder


@pytest.mark.filterwarnings("ignore:.*the following arguments do not match")
@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[message for _, message in CHANGES])
def test_changed_settings_are_refused_at_a_resume(finished_run, tmp_path, change, message):
    trainer = make_trainer(tmp_path, num_alternations=2, **change)
    with pytest.raises(ValueError, match=f"The checkpoint belongs to another run: .*{message}"):
        trainer.train(resume_from_checkpoint=str(finished_run / "checkpoint-4"))


# What depends on the clock, and the whole run's mean over the steps since the resume.
UNSTABLE = {"samples_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


def stable_logs(trainer) -> list[dict]:
    return [
        {name: value for name, value in entry.items() if name not in UNSTABLE and not name.endswith("_second")
         and not name.endswith("_runtime")}
        for entry in trainer.state.log_history
    ]  # fmt: skip


def optimizer_tensors(trainer) -> dict[str, torch.Tensor]:
    return {
        f"{level}.{number}.{name}": value
        for level, state in trainer.two_level_optimizer.state_dict().items()
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }


SETTINGS = {"num_alternations": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Dropout, random masks and an evaluation in each alternation."""
    trainer = make_text_trainer(tmp_path_factory.mktemp("whole"), evaluate=True, **SETTINGS)
    trainer.train()
    return trainer


def check_same_run(resumed, whole) -> None:
    assert resumed.state.global_step == whole.state.global_step == 15
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    states = optimizer_tensors(resumed), optimizer_tensors(whole)
    assert len(states[0]) > 10
    assert same_tensors(*states)
    logs = [log for log in stable_logs(whole) if "lower/loss" in log]
    assert len(logs) == 3
    assert all({"levels/pull", "alignment/cosine", "solver/residual"} <= set(log) for log in logs)
    assert sum("eval_upper_loss" in log for log in stable_logs(whole)) == 3
    assert stable_logs(resumed) == stable_logs(whole)


@pytest.mark.parametrize(
    ("step", "workers"), [(2, 0), (4, 0), (5, 0), (8, 2), (9, 2), (15, 0)],
    ids=["lower", "upper", "alternation", "lower-workers", "upper-workers", "end"],
)  # fmt: skip
def test_a_resumed_run_is_the_same_run(uninterrupted, tmp_path, step, workers):
    folder = uninterrupted.args.output_dir
    resumed = make_text_trainer(tmp_path, evaluate=True, dataloader_num_workers=workers, **SETTINGS)
    torch.manual_seed(12345)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-{step}")
    check_same_run(resumed, uninterrupted)


def test_a_resume_between_two_logs_goes_on_with_the_figures(tmp_path):
    settings = {"num_alternations": 2, "logging_strategy": "steps", "logging_steps": 4, "save_total_limit": None}
    whole = make_trainer(tmp_path / "whole", save_strategy="steps", save_steps=3, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert [log for log in stable_logs(resumed) if "levels/pull" in log] == [
        log for log in stable_logs(whole) if "levels/pull" in log
    ]
