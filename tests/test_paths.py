"""A folder's own files: no name leads out of it and no symbolic link is followed."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch

from bissl_hf.checkpoints import find_defect, write_manifest
from bissl_hf.hub.folder import files_beside_checkpoint, files_of_checkpoint, lay_out, outputs_of_run
from bissl_hf.models.saving import save_model
from bissl_hf.paths import is_inner_name, is_own_file, own_files
from bissl_hf.trainer.state_files import find_refused_file

from .conftest import tiny_model


@pytest.mark.parametrize(
    "name", ["/etc/a", "../a", "a/../../b", "C:\\a", "C:a", "..\\a", "\\\\host\\a", "", ".",
             "a\0b", 3, None]
)  # fmt: skip
def test_names_that_lead_out_are_none_of_a_folder(name):
    assert not is_inner_name(name)


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("PRIVATE")
    return tmp_path / "outside" / "secret.json"


@pytest.fixture
def run(tmp_path: Path, secret: Path) -> Path:
    """An output folder in which every name that belongs on the Hub is there twice: as a file and as a link."""
    run = tmp_path / "run"
    (run / "figures").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "figures" / "a.png").write_text("figure")
    (run / "linked.json").symlink_to(secret)
    (run / "figures" / "b.png").symlink_to(secret)
    (run / "figures" / "sub").symlink_to(secret.parent)
    (run / "bilevel").symlink_to(secret.parent)
    (run / "README.md").symlink_to(secret)
    os.mkfifo(run / "pipe.json")
    return run


def test_only_own_files_of_an_output_folder_are_pushed(run):
    assert [name for _, name in outputs_of_run(run)] == ["config.json", "figures/a.png"]
    assert list(own_files(run)) == ["config.json", "figures/a.png"]
    beside = files_beside_checkpoint(run, ["linked.json", "figures", "bilevel", "../outside", "/etc", "gone"], "last")
    assert [name for _, name in beside] == ["last/figures/a.png"]


def test_an_output_folder_that_is_a_link_itself_is_one(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    assert is_own_file(tmp_path / "link", "config.json")


@pytest.mark.parametrize("name", ["../outside/secret.json", "absolute", "linked.json"])
def test_a_manifest_that_names_other_files_is_refused_and_they_are_not_pushed(tmp_path, secret, name):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    write_manifest(checkpoint)
    assert find_defect(checkpoint) is None
    name = str(secret) if name == "absolute" else name
    if name == "linked.json":
        (checkpoint / name).symlink_to(secret)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": secret.stat().st_size, "xxh3_128": ""}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    expected = "is reached through a symbolic link" if name == "linked.json" else "which is outside of it"
    assert expected in str(find_defect(checkpoint))
    assert [path for _, path in files_of_checkpoint(checkpoint, "last")] == ["last/config.json", "last/manifest.json"]


def test_a_tree_has_no_file_outside_and_no_link(tmp_path, run, secret):
    tree = tmp_path / "tree"
    tree.mkdir()
    with pytest.raises(ValueError, match=r"\.\./x is no path inside a repository"):
        lay_out([(run / "config.json", "../x")], tree)
    lay_out([(run / "linked.json", "x"), (run / "config.json", "config.json")], tree)
    assert [path.name for path in tree.iterdir()] == ["config.json"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_have_the_permissions_of_the_umask_and_reach_the_disk_before_they_are_renamed(
    tmp_path, monkeypatch, mask
):
    synchronised, fsync = [], os.fsync

    def note(descriptor: int) -> None:
        synchronised.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    before = os.umask(mask)
    try:
        save_model(tiny_model().upper, tmp_path / "model")
    finally:
        os.umask(before)
    files = sorted((tmp_path / "model").iterdir())
    assert [path.name for path in files] == ["config.json", "model.safetensors"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    assert {Path(path).name for path in synchronised[:-1]} == {"config.json", "model.safetensors"}
    assert all(".export-" in path for path in synchronised[:-1])
    assert synchronised[-1] == str(tmp_path / "model")


class Harm:
    """Runs code when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


def test_files_that_would_run_code_are_found(tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    torch.save({"state": torch.ones(2)}, checkpoint / "optimizer.pt")
    assert find_refused_file(checkpoint) is None
    torch.save(Harm(tmp_path / "witness"), checkpoint / "scheduler.pt")
    assert "scheduler.pt holds more than tensors and numbers" in str(find_refused_file(checkpoint))
    (checkpoint / "optimizer.pt").write_bytes(b"")
    assert "optimizer.pt is not a file as torch.save writes it" in str(find_refused_file(checkpoint))
    assert not (tmp_path / "witness").exists()
