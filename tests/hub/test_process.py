"""Jobs at the Hub end in any case, and tell what came of them."""

import os
import re
import subprocess
import sys
import time

import pytest

from bissl_hf.hub import process as hub_process
from bissl_hf.hub.process import DownloadJob, HubProcess, HubResult, UploadJob

from ..hub_stand_in import OTHER_TOKEN, READ_ONLY_TOKEN, HubStandIn


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(hub_process, "PATIENCE_SECONDS", 3.0)
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "config.json").write_text("{}")
    (tmp_path / "tree" / "sub" / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "tree"


def upload(tree, **options) -> HubResult:
    return HubProcess(UploadJob("name", folder=str(tree), message="a push", **options)).result()


def test_a_folder_is_uploaded_to_a_new_private_repository_and_branch(hub, tree):
    result = upload(tree, private=True, revision="experiment")
    assert (result.outcome, result.repo_id) == ("done", "user/name")
    assert hub.repositories["model", "user/name"].private
    commit = hub.commits("user/name", branch="experiment")[-1]
    assert (commit.message, commit.oid) == ("a push", result.commit_oid)
    assert commit.files["sub/model.safetensors"] == b"weights"
    assert list(hub.files("user/name")) == [".gitattributes"]


def test_what_the_folder_lacks_goes_where_a_pattern_says_so(hub, tree):
    hub.add_repository("user/name", {"sub/old.json": "", "README.md": "mine", "other/old.json": ""})
    assert upload(tree, delete_patterns=("sub/*",)).outcome == "done"
    assert sorted(hub.files("user/name")) == ["README.md", "config.json", "other/old.json", "sub/model.safetensors"]


@pytest.mark.parametrize(
    ("token", "reason"),
    [
        (None, "there is no token"),
        ("hf_wrong", r"it answered 401 \(Invalid credentials"),
        (READ_ONLY_TOKEN, "the token may only read"),
    ],
)
def test_a_token_that_may_not_write_is_refused(hub, monkeypatch, tmp_path, token, reason):
    hub.add_repository("user/name")
    hub.patch(monkeypatch, tmp_path / "home", token)
    result = HubProcess(UploadJob("name")).result()
    assert result.outcome == "refused"
    assert re.match(reason, result.reason)


def test_a_token_may_be_given_and_travels_in_the_environment(hub, monkeypatch, tmp_path):
    hub.patch(monkeypatch, tmp_path / "home", "hf_wrong")
    assert HubProcess(UploadJob("name"), token=OTHER_TOKEN).result().repo_id == "somebody/name"


def test_a_name_that_cannot_be_is_refused(hub):
    result = HubProcess(UploadJob("not a name")).result()
    assert result.outcome == "refused"
    assert "not a name" in result.reason


@pytest.mark.parametrize(
    ("fault", "outcome", "reason"),
    [
        ("refuse", "failed", "the connection failed"),
        ("hang", "stalled", "it made no progress for 3 seconds"),
        ("401", "refused", "it answered 401"),
        ("403", "refused", "it answered 403"),
        ("409", "failed", "it answered 409"),
        ("429", "failed", "it answered 429"),
        ("500", "failed", "it answered 500"),
        ("cut", "failed", "the connection failed"),
    ],
)
def test_an_upload_ends_with_each_fault(hub, tree, fault, outcome, reason):
    hub.fail(fault, path="/commit/")
    result = upload(tree)
    assert (result.outcome, result.reason[: len(reason)]) == (outcome, reason)


@pytest.mark.parametrize("fault", ["429", "500"])
def test_requests_that_are_repeated_are_repeated_for_as_long_as_the_patience_lasts(hub, tree, fault):
    hub.fail(fault, path="preupload")
    assert upload(tree) == HubResult("stalled", "it made no progress for 3 seconds")
    assert len([request for request in hub.requests if "preupload" in request.path]) >= 3
    hub.recover()
    hub.fail(fault, path="preupload", times=1)
    assert upload(tree).outcome == "done"


def test_the_patience_holds_also_for_calls_that_ask_for_no_time_out(hub, tree):
    """Which files there are is asked before some are deleted."""
    hub.add_repository("user/name")
    hub.fail("hang", path="/tree/")
    assert upload(tree, delete_patterns=("sub/*",)) == HubResult("stalled", "it made no progress for 3 seconds")


def test_time_outs_stay_in_the_process_of_the_job(hub, tree):
    from huggingface_hub import get_session

    upload(tree)
    assert get_session().timeout.read is None


def test_nothing_is_asked_offline(hub, tree, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert upload(tree) == HubResult("stalled", "HF_HUB_OFFLINE is set")
    assert hub.requests == []


def test_a_process_that_breaks_is_told_too(hub, tree, monkeypatch):
    monkeypatch.setattr(hub_process, "__file__", str(tree / "missing.py"))
    result = upload(tree)
    assert result.outcome == "failed"
    assert "the process ended with code 2" in result.reason


def test_a_folder_is_downloaded_if_it_is_there(hub, tmp_path):
    target = str(tmp_path / "target")
    assert HubProcess(DownloadJob("name", "sub", target)).result().outcome == "missing"
    hub.add_repository("user/name", {"sub/a.json": "{}", "b.json": "{}"}, private=True)
    assert HubProcess(DownloadJob("name", "other", target)).result().outcome == "missing"
    assert HubProcess(DownloadJob("name", "sub", target)).result() == HubResult("done", repo_id="user/name")
    assert (tmp_path / "target" / "sub" / "a.json").read_text() == "{}"
    assert not (tmp_path / "target" / "b.json").exists()
    hub.fail("hang")
    assert HubProcess(DownloadJob("name", "sub", target)).result().outcome == "stalled"


def test_a_hanging_job_ends_with_the_process_that_ordered_it_also_when_that_is_killed(hub, tree):
    hub.fail("hang")
    code = (
        "import sys, time; from bissl_hf.hub import process; process.PATIENCE_SECONDS = 600.0\n"
        f"job = process.HubProcess(process.UploadJob('name', folder={str(tree)!r}))\n"
        "print(job._process.pid, flush=True); time.sleep(600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **hub.environment(tree)}
    )
    pid = int(owner.stdout.readline())
    while not hub.requests:
        time.sleep(0.05)
    owner.kill()
    owner.communicate()
    deadline = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(pid)


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
