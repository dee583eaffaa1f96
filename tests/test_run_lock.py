"""One run in a folder, with owners in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bissl_hf import run_lock
from bissl_hf.run_lock import LOCK_NAME, hold_folder, holding_folder, release_folder, releasing_folders

OWNER = "import sys, time; from bissl_hf.run_lock import hold_folder; hold_folder(sys.argv[1])"


@contextmanager
def owning(folder: Path, then: str = "") -> Iterator[subprocess.Popen]:
    """A process that holds the lock of a folder, killed at the end with its children."""
    code = f"{OWNER}\n{then}\nprint('held', flush=True)\ntime.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as owner:
        try:
            assert owner.stdout.readline() == "held\n"
            yield owner
        finally:
            os.killpg(owner.pid, signal.SIGKILL)


def test_a_second_run_is_refused_and_a_dead_owner_is_taken_over(tmp_path, capsys):
    with owning(tmp_path) as owner, pytest.raises(ValueError, match=f"is in use by process {owner.pid} on .* another"):
        hold_folder(tmp_path)
    with holding_folder(tmp_path):
        assert f"from process {owner.pid}" in capsys.readouterr().err
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path):
    with owning(tmp_path, "import os\nif os.fork() == 0: time.sleep(60)") as owner:
        owner.kill()
        owner.wait()
        with holding_folder(tmp_path):
            pass


def test_the_same_process_may_hold_a_folder_inside_a_longer_hold(tmp_path):
    assert hold_folder(tmp_path)
    with holding_folder(tmp_path):
        pass
    assert (tmp_path / LOCK_NAME).exists(), "the longer hold goes on"
    release_folder(tmp_path)
    assert not (tmp_path / LOCK_NAME).exists()


def test_a_command_gives_back_what_it_took(tmp_path):
    assert hold_folder(tmp_path / "before")
    with releasing_folders():
        assert hold_folder(tmp_path / "meanwhile")
        assert not hold_folder(tmp_path / "before")
    assert not (tmp_path / "meanwhile" / LOCK_NAME).exists()
    assert (tmp_path / "before" / LOCK_NAME).exists()
    release_folder(tmp_path / "before")


@pytest.mark.parametrize(("age", "refused"), [(0, True), (60, True), (600, False)])
def test_the_lock_of_another_machine_counts_while_it_is_renewed(tmp_path, age, refused):
    lock = tmp_path / LOCK_NAME
    lock.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": "then"}))
    os.utime(lock, (time.time() - age,) * 2)
    if refused:
        with pytest.raises(ValueError, match="process 1 on elsewhere"):
            hold_folder(tmp_path)
    else:
        with holding_folder(tmp_path):
            pass


@pytest.mark.parametrize("content", ["", "[", "[]", '{"pid": 3}'])
def test_a_lock_that_says_nothing_is_taken(tmp_path, content):
    (tmp_path / LOCK_NAME).write_text(content)
    with holding_folder(tmp_path):
        pass


def test_without_locks_of_the_kernel_the_process_decides(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", no_locks)
    owner = subprocess.Popen(["sleep", "60"])
    lock = tmp_path / LOCK_NAME
    lock.write_text(json.dumps({"pid": owner.pid, "host": run_lock.socket.gethostname(), "started": "then"}))
    try:
        with pytest.raises(ValueError, match=f"process {owner.pid}"):
            hold_folder(tmp_path)
    finally:
        owner.kill()
        owner.wait()
    with holding_folder(tmp_path):
        pass


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=r"run has a link in the place of \.run\.lock: remove it"):
        hold_folder(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"
