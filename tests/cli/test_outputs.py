"""Folders of runs, and tables."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from transformers import TrainingArguments

from bissl_hf.checkpoints import write_manifest
from bissl_hf.cli import outputs
from bissl_hf.run_lock import LOCK_NAME, release_folder
from bissl_hf.text import format_table

from ..hub_stand_in import HubStandIn
from ..processes import run_in_processes

# Folders


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("resume", [None, False, "false", "False", "", "none", "true", True])
def test_a_new_folder_is_made(resume: str | bool | None, tmp_path: Path) -> None:
    assert outputs.open_output_dir(str(tmp_path / "a" / "b"), resume) is None
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("resume", [None, False, "false"])
def test_a_folder_in_use_needs_a_resume(resume: str | bool | None, tmp_path: Path) -> None:
    checkpoint(tmp_path, 4)
    with pytest.raises(ValueError, match="holds files, maybe of an unfinished run; pass --resume_from_checkpoint tr"):
        outputs.open_output_dir(str(tmp_path), resume)
    (tmp_path / outputs.RUN_RESULTS).write_text("{}")
    with pytest.raises(ValueError, match="holds a finished run; pass --resume_from_checkpoint true"):
        outputs.open_output_dir(str(tmp_path), resume)


@pytest.mark.parametrize("resume", [True, "true", "True"])
def test_the_newest_whole_checkpoint_is_found(
    resume: str | bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, 4)
    whole, cut, bare = (checkpoint(tmp_path, step) for step in (8, 12, 100))
    (cut / "model.safetensors").write_bytes(b"weight")
    (bare / "manifest.json").unlink()
    assert outputs.open_output_dir(str(tmp_path), resume) == whole
    assert capsys.readouterr().err.splitlines() == [
        f"Passing over {bare}, which is not whole: it has no manifest.json, which is written last.",
        f"Passing over {cut}, which is not whole: model.safetensors has 6 bytes instead of 7.",
    ]


def test_a_checkpoint_that_is_named_is_taken(tmp_path: Path) -> None:
    older = checkpoint(tmp_path, 4)
    checkpoint(tmp_path, 8)
    assert outputs.open_output_dir(str(tmp_path), str(older)) == older
    with pytest.raises(ValueError, match=r"resume_from_checkpoint is .*checkpoint-5; there is no such folder"):
        outputs.open_output_dir(str(tmp_path), str(tmp_path / "checkpoint-5"))
    (older / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-4, which is not whole: model.safetensors is missing\. Pass true"
    ):
        outputs.open_output_dir(str(tmp_path), str(older))


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=f"output_dir {path} cannot be written to .*; choose another"):
            outputs.open_output_dir(str(path), None)

    def refuse(**kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # Permissions do not hold the superuser back, so the file system is played.
    monkeypatch.setattr(outputs.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot be written to \(Permission denied\)"):
        outputs.open_output_dir(str(tmp_path / "new"), None)


# What comes after a run


@pytest.mark.parametrize(
    "error", [RuntimeError("no\n  memory \x1b[2J"), MemoryError(), UnicodeEncodeError("ascii", "é", 0, 1, "-")]
)
def test_what_comes_after_a_run_fails_with_a_warning(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with outputs.afterwards("The figure"):
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: The figure failed, and the run's results are whole without it: ")
    assert line.isascii()
    assert "\x1b" not in line


def test_what_stops_a_run_is_no_warning() -> None:
    with pytest.raises(KeyboardInterrupt), outputs.afterwards("The figure"):
        raise KeyboardInterrupt


# Locks


def test_a_run_holds_its_folder(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    try:
        outputs.open_run(args, leaves=())
        assert (tmp_path / LOCK_NAME).is_file()
        assert outputs.open_output_dir(str(tmp_path), None) is None, "a lock is no sign of a run"
    finally:
        release_folder(tmp_path)
    elsewhere = {"pid": 1, "host": "elsewhere", "started": "now"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(elsewhere))
    with pytest.raises(ValueError, match="is in use by process 1 on elsewhere"):
        outputs.open_run(args, leaves=())


# Tables


def test_table() -> None:
    rows = [{"model": "before", "accuracy": 7}, {"model": "the aligned one", "accuracy": "98.00 %"}]
    assert format_table(rows).splitlines() == [
        "model            accuracy",
        "---------------  --------",
        "before           7",
        "the aligned one  98.00 %",
    ]


def test_metrics_are_named_for_users_the_main_one_first() -> None:
    metrics = {"test_loss": 1.5, "test_mean_class_accuracy": 0.5, "test_accuracy": 0.12345, "eval_accuracy": 1.0}
    assert list(outputs.name_metrics(metrics, "test").items()) == [
        ("accuracy", "12.35 %"),
        ("mean per class", "50.00 %"),
    ]
    assert outputs.name_metrics({"before_map": 0.0}, "before") == {"11-point mAP": "0.00 %"}


def test_a_checkpoint_of_another_folder_is_refused(tmp_path):
    checkpoint = tmp_path / "elsewhere" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint)
    with pytest.raises(ValueError, match="is not in output_dir"):
        outputs.open_output_dir(str(tmp_path / "here"), str(checkpoint))


def test_a_model_from_elsewhere_is_not_written_over(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"holds a model and nothing that this recipe could go on with \(seed-\*, sea"
    ):
        outputs.open_output_dir(str(tmp_path), "true", leaves=("seed-*", "search"))
    assert outputs.open_output_dir(str(tmp_path), "true") is None, "whoever names nothing is not asked"
    (tmp_path / "seed-3").mkdir()
    assert outputs.open_output_dir(str(tmp_path), "true", leaves=("seed-*", "search")) is None


def test_a_table_without_rows_is_no_text():
    assert format_table([]) == ""


def open_in_process(environment: dict[str, str], folder: str) -> None:
    os.environ |= environment
    args = TrainingArguments(output_dir=folder, resume_from_checkpoint="hub", hub_model_id="user/run", use_cpu=True)
    assert args.world_size == 2
    assert outputs.open_run(args, leaves=("checkpoint-*",)) == Path(folder) / "checkpoint-7"
    total = torch.tensor(1.0 + dist.get_rank())
    dist.all_reduce(total)  # the processes are in step
    assert total == 3


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_fetch_a_checkpoint_once_and_stay_in_step(tmp_path):
    state = '{"global_step": 7}'
    checksum = xxhash.xxh3_128(state.encode()).hexdigest()
    manifest = json.dumps({"files": {"trainer_state.json": {"bytes": len(state), "xxh3_128": checksum}}})
    with HubStandIn() as hub:
        files = {"last-checkpoint/trainer_state.json": state, "last-checkpoint/manifest.json": manifest}
        hub.add_repository("user/run", files)
        run_in_processes(open_in_process, 2, hub.environment(tmp_path / "home"), str(tmp_path / "run"))
    assert [request.method for request in hub.requests if "resolve" in request.path].count("GET") == 2
