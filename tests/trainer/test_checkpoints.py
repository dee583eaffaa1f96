"""Checkpoints are whole or not there, and a run goes on from one as if it had not been interrupted."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from bissl_hf.checkpoints import (
    MANIFEST_NAME,
    RUN_TENSORS_NAME,
    STAGING_FOLDER,
    DamagedFileError,
    find_defect,
    find_last_checkpoint,
    list_checkpoints,
    publish,
    read_mapping,
    read_run_state,
    rotate_checkpoints,
    write_json,
    write_manifest,
    write_mapping,
)
from bissl_hf.trainer.state_files import read_trainer_state

from .trainers import make_text_trainer, make_trainer, same_tensors


def whole_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "inner").mkdir()
    (folder / "inner" / "state").write_text("x")
    write_manifest(folder)
    return folder


def test_a_manifest_lists_every_file_with_its_size_and_checksum(tmp_path):
    folder = whole_checkpoint(tmp_path / "checkpoint-1")
    assert json.loads((folder / MANIFEST_NAME).read_text()) == {
        "files": {
            name: {
                "bytes": (folder / name).stat().st_size,
                "xxh3_128": xxhash.xxh3_128((folder / name).read_bytes()).hexdigest(),
            }
            for name in ("weights", "inner/state")
        }
    }
    assert find_defect(folder) is None


def test_a_flipped_bit_is_found_where_contents_are_looked_at(tmp_path):
    folder = whole_checkpoint(tmp_path / "checkpoint-1")
    content = bytearray((folder / "weights").read_bytes())
    content[2] ^= 1
    (folder / "weights").write_bytes(content)
    assert find_defect(folder) == "weights is damaged: its checksum is not that with which it was written"
    assert find_defect(folder, contents=False) is None


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 9])
def test_rotation_goes_by_step_whatever_the_clock_says(tmp_path, limit):
    for step in (9, 10, 100, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        os.utime(folder, (10**9 - step, 10**9 - step))  # the newest step has the oldest time
    rotate_checkpoints(tmp_path, limit, keep={"checkpoint-2"})
    left = {path.name for path in tmp_path.iterdir()}
    expected = {1: {2, 100}, 2: {2, 100}, 3: {2, 10, 100}}.get(limit or 9, {2, 9, 10, 100})
    assert left == {f"checkpoint-{step}" for step in expected}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", "null", '{"no_such_field": 1}', '{"global_step": "3"}', '{"global_step": -1}', "[" * 100_000],
)
def test_an_edited_state_of_trainer_is_one_sentence(tmp_path, content):
    (tmp_path / "trainer_state.json").write_text(content)
    if content == "{}":
        assert read_trainer_state(tmp_path).global_step == 0
        return
    with pytest.raises(DamagedFileError, match=r"trainer_state.json .*Resume from another checkpoint"):
        read_trainer_state(tmp_path)


def test_a_state_without_that_of_an_owner_is_refused(tmp_path):
    for state in ("{}", '{"metrics": 3}'):
        (tmp_path / "run_state.json").write_text(f'{{"settings": {{}}, "state": {state}}}')
        assert read_run_state(tmp_path)["settings"] == {}
        with pytest.raises(DamagedFileError, match=r"run_state.json .*Resume from another checkpoint"):
            read_run_state(tmp_path, owners=["metrics"])


def test_a_mapping_is_known_by_its_checksum(tmp_path):
    path = tmp_path / "figures.json"
    write_mapping(path, {"loss": 0.1, "rows": (1, 2), "nan": float("inf")})
    assert read_mapping(path) == {"loss": 0.1, "rows": [1, 2], "nan": float("inf")}
    path.write_text(path.read_text().replace("0.1", "0.3"))
    with pytest.raises(DamagedFileError, match=r"figures.json is empty or damaged. Put a whole copy"):
        read_mapping(path)
    write_mapping(path, {"loss": 0.1, "rows": [{"eval_runtime": 2.0, "train_seconds": 1.0}]})
    path.write_text(path.read_text().replace("2.0", "3.0"))
    assert read_mapping(path)["rows"][0]["eval_runtime"] == 3.0, "two equal runs have the same checksum"
    path.write_text('{"loss": 0.3}')
    assert read_mapping(path) == {"loss": 0.3}, "of an earlier version, or of somebody's hand"


def test_an_edited_state_is_one_sentence(tmp_path):
    for content in ("{", "[]", '{"settings": 1, "state": {}}', "[" * 100_000):
        (tmp_path / "run_state.json").write_text(content)
        with pytest.raises(ValueError, match=r"run_state.json .*Resume from another checkpoint"):
            read_run_state(tmp_path)


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
    with pytest.raises(
        ValueError, match=r"checkpoint-15 is not whole: model.safetensors has .*one is .*checkpoint-10"
    ):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(harmed))
    shutil.rmtree(tmp_path / "checkpoint-10")
    with pytest.raises(ValueError, match="there is no whole one beside it"):
        make_trainer(tmp_path, **settings).train(resume_from_checkpoint=str(harmed))


CHANGES = [
    ({"seed": 8}, "seed was 7 and is 8"),
    ({"per_device_lower_batch_size": 6}, "lower was 3 batches of 8 from 24 examples and is 3 batches of 6"),
    ({"per_device_train_batch_size": 4}, "upper was 2 batches of 5 from 12 examples and is 2 batches of 4"),
    ({"curvature_batch_size": 4}, "curvature was 1 batches of 8 from 24 examples and is 1 batches of 4"),
    ({"lower_steps": 4}, "lower was 3 batches of 8 from 24 examples and is 4 batches of 8"),
    ({"upper_steps": 3}, "upper was 2 batches of 5 from 12 examples and is 3 batches of 5"),
    ({"train_rows": 13}, "upper was 2 batches of 5 from 12 examples and is 2 batches of 5 from 13"),
    ({"lower_rows": 25}, "lower was 3 batches of 8 from 24 examples and is 3 batches of 8 from 25"),
]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, save_strategy="steps", save_steps=4, num_alternations=2, save_total_limit=None).train()
    return folder


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: str(value)[:30])
def test_changed_settings_are_refused_at_a_resume(finished_run, tmp_path, change, message):
    trainer = make_trainer(tmp_path, num_alternations=2, **change)
    with pytest.raises(ValueError, match=f"The checkpoint belongs to another run: .*{message}"):
        trainer.train(resume_from_checkpoint=str(finished_run / "checkpoint-4"))


def stable_logs(trainer) -> list[dict]:
    """The logs without what depends on the clock, and without Trainer's own means over steps since its start."""
    clock = ("_runtime", "_per_second")
    return [
        {name: value for name, value in log.items() if not name.endswith(clock) and name not in ("loss", "train_loss")}
        for log in trainer.state.log_history
    ]


def optimizer_tensors(trainer) -> dict[str, torch.Tensor]:
    return {
        f"{level}.{number}.{name}": value
        for level, state in trainer.two_level_optimizer.state_dict().items()
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }


STEPWISE = {"num_alternations": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
BY_ALTERNATION = {"num_alternations": 3, "save_strategy": "epoch", "save_total_limit": None}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Dropout, random masks and an evaluation in each alternation; a checkpoint after each step or alternation."""
    trainers = []
    for settings in (STEPWISE, BY_ALTERNATION):
        trainers.append(make_text_trainer(tmp_path_factory.mktemp("whole"), evaluate=True, **settings))
        trainers[-1].train()
    return trainers


def check_same_state(resumed, whole) -> None:
    assert resumed.state.global_step == whole.state.global_step == 15
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    states = optimizer_tensors(resumed), optimizer_tensors(whole)
    assert len(states[0]) > 10
    assert same_tensors(*states)


def check_same_logs(resumed, whole) -> None:
    logs = [log for log in stable_logs(whole) if "lower/loss" in log]
    assert len(logs) == 3
    assert all({"levels/pull", "levels/moved", "alignment/cosine", "solver/residual"} <= set(log) for log in logs)
    assert sum("eval_upper_loss" in log for log in stable_logs(whole)) == 3
    assert stable_logs(resumed) == stable_logs(whole)


def resume(whole, output_dir, step, settings, **overrides):
    resumed = make_text_trainer(output_dir, evaluate=True, **settings, **overrides)
    torch.manual_seed(12345)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-{step}")
    # Ends the workers: when the garbage collector finds them, torch waits 5 seconds for each (torch 2.13).
    resumed.callback_handler.train_dataloader._iterator = None
    return resumed


INSIDE = {"lower": (2, 0), "upper": (4, 0), "lower-workers": (8, 2), "upper-workers": (9, 2)}


@pytest.mark.parametrize(("step", "workers"), INSIDE.values(), ids=INSIDE)
def test_a_run_resumed_inside_a_phase_is_the_same_run(uninterrupted, tmp_path, step, workers):
    whole, _ = uninterrupted
    resumed = resume(whole, tmp_path, step, STEPWISE, dataloader_num_workers=workers)
    check_same_state(resumed, whole)
    check_same_logs(resumed, whole)


@pytest.mark.parametrize(("step", "workers"), [(5, 0), (10, 2), (15, 0)], ids=["first", "second-workers", "end"])
def test_a_run_resumed_between_alternations_is_the_same_run(uninterrupted, tmp_path, step, workers):
    _, whole = uninterrupted
    resumed = resume(whole, tmp_path, step, BY_ALTERNATION, dataloader_num_workers=workers)
    check_same_state(resumed, whole)
    check_same_logs(resumed, whole)
    assert same_tensors(resumed.model.state_dict(), uninterrupted[0].model.state_dict())


@pytest.mark.parametrize("step", [5, 15])
def test_a_checkpoint_of_the_last_step_of_an_alternation_holds_the_state(uninterrupted, tmp_path, step):
    """With save_strategy="steps" it is written before the alternation's log and evaluation."""
    whole, _ = uninterrupted
    check_same_state(resume(whole, tmp_path, step, STEPWISE), whole)


def test_figures_saved_before_the_log_of_their_alternation_do_not_reach_the_next_log(uninterrupted, tmp_path):
    whole, _ = uninterrupted
    resumed = resume(whole, tmp_path, 5, STEPWISE)
    found, expected = ([log for log in stable_logs(t) if "lower/loss" in log][-2:] for t in (resumed, whole))
    assert found == expected


def test_a_resume_between_two_logs_goes_on_with_the_figures(tmp_path):
    settings = {
        "num_alternations": 2, "logging_strategy": "steps", "logging_steps": 4, "save_strategy": "steps",
        "save_steps": 3, "save_total_limit": None,
    }  # fmt: skip
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert same_tensors(resumed.model.state_dict(), whole.model.state_dict())
    assert stable_logs(resumed) == stable_logs(whole)
    assert sum("levels/pull" in log for log in stable_logs(whole)) == 2


RECYCLED = {
    "num_alternations": 2, "lower_steps": 2, "upper_steps": 3, "solver": "recycled", "solver_max_iterations": 2,
    "save_strategy": "steps", "save_steps": 1, "save_total_limit": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def recycled_run(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("recycled"), **RECYCLED)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [4, 8])
def test_a_resume_inside_an_upper_phase_finds_what_the_solver_has_learned(recycled_run, tmp_path, monkeypatch, step):
    checkpoint = Path(recycled_run.args.output_dir) / f"checkpoint-{step}"
    for forgetful in (False, True):
        resumed = make_trainer(tmp_path, **RECYCLED)
        if forgetful:
            monkeypatch.setattr(resumed.upper_phase, "load_state_dict", lambda state: None)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        same = same_tensors(resumed.model.state_dict(), recycled_run.model.state_dict())
        assert same is not forgetful, "the directions must matter in this test"
        assert (stable_logs(resumed) == stable_logs(recycled_run)) is not forgetful


def test_only_a_checkpoint_inside_an_upper_phase_holds_directions(recycled_run):
    folders = list_checkpoints(Path(recycled_run.args.output_dir))
    holders = [
        folder.name
        for folder in folders
        if (folder / RUN_TENSORS_NAME).exists()
        and any(name.startswith("upper_phase/memory/") for name in load_file(folder / RUN_TENSORS_NAME))
    ]
    assert holders == [f"checkpoint-{step}" for step in (3, 4, 8, 9)]
