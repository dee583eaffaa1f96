"""The stand-in for the Hub answers the real clients as the Hub does, and fails as asked."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetForImageClassification

from bissl_hf import load_image_dataset
from bissl_hf.hub.process import httpx

from .conftest import tiny_resnet_config
from .hub_stand_in import OTHER_TOKEN, READ_ONLY_TOKEN, TOKEN, HubStandIn

CONTENT = {"config.json": b'{"a": 1}', "sub/weights.safetensors": bytes(range(256)) * 8}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        yield hub


def write_folder(folder: Path) -> Path:
    for path, content in CONTENT.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_a_folder_goes_up_in_one_commit_and_comes_back(hub, tmp_path):
    api = HfApi()
    assert api.whoami()["name"] == "user"
    assert api.create_repo("name").repo_id == "user/name"
    assert api.create_repo("name", exist_ok=True).repo_id == "user/name"
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo("name")
    commit = api.upload_folder(repo_id="user/name", folder_path=write_folder(tmp_path / "up"), commit_message="first")
    assert [commit.message for commit in hub.commits("user/name")] == ["initial commit", "first"]
    assert {path: hub.files("user/name")[path] for path in CONTENT} == CONTENT
    assert [r.method for r in hub.requests if "lfs-objects" in r.path] == ["PUT"]
    assert api.model_info("user/name").sha == commit.oid
    assert sorted(api.list_repo_files("user/name")) == [".gitattributes", *CONTENT]
    down = Path(snapshot_download("user/name", revision=commit.oid))
    assert {path: (down / path).read_bytes() for path in CONTENT} == CONTENT


def test_only_what_has_changed_is_sent_and_what_is_gone_is_deleted(hub, tmp_path):
    api = HfApi()
    hub.add_repository("user/name", {**CONTENT, "old/a.json": "{}"})
    folder = write_folder(tmp_path / "up")
    (folder / "config.json").write_bytes(b"{}")
    api.upload_folder(repo_id="user/name", folder_path=folder, delete_patterns=["old/*"])
    assert hub.files("user/name") == {**CONTENT, "config.json": b"{}"}
    assert hub.requests[-1].body.count(b'"key"') == 3  # the message, one file and one deletion


def test_missing_things_are_told_apart(hub):
    hub.add_repository("user/name", CONTENT)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("user/other", "config.json")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("user/name", "other.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("user/name", "config.json", revision="other")
    api = HfApi()
    api.create_branch("user/name", branch="other")
    assert sorted(ref.name for ref in api.list_repo_refs("user/name").branches) == ["main", "other"]
    assert Path(hf_hub_download("user/name", "config.json", revision="other")).read_bytes() == CONTENT["config.json"]


def test_who_may_read_and_write(hub):
    hub.add_repository("user/private", CONTENT, private=True)
    hub.add_repository("user/gated", CONTENT, gated=True)
    for token in (OTHER_TOKEN, False):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("user/private", "config.json", token=token)
    assert hf_hub_download("user/private", "config.json", token=TOKEN)
    with pytest.raises(GatedRepoError):
        hf_hub_download("user/gated", "config.json", token=OTHER_TOKEN)
    hub.repositories["model", "user/gated"].granted.add("somebody")
    assert hf_hub_download("user/gated", "config.json", token=OTHER_TOKEN)
    for token, status in (("hf_wrong", 401), (READ_ONLY_TOKEN, 403), (OTHER_TOKEN, 403)):
        with pytest.raises(HfHubHTTPError) as refusal:
            HfApi(token=token).create_repo("user/new")
        assert refusal.value.response.status_code == status


def test_parts_of_files_are_served(hub):
    hub.add_repository("user/name", CONTENT)
    url = f"{hub.url}/user/name/resolve/main/sub/weights.safetensors"
    answer = httpx.get(url, headers={"Range": "bytes=3-9"})
    assert (answer.status_code, answer.content) == (206, bytes(range(3, 10)))


def test_a_model_is_loaded_from_it(hub, tmp_path):
    model = ResNetForImageClassification(tiny_resnet_config())
    model.save_pretrained(tmp_path / "model")
    hub.add_folder("user/model", tmp_path / "model")
    loaded = AutoModelForImageClassification.from_pretrained("user/model")
    assert all(value.equal(model.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_of_parquet_is_loaded_from_it(hub, tmp_path, streaming):
    rows = datasets.Dataset.from_dict({"label": [0, 1, 1], "text": ["a", "b", "c"]})
    rows.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    hub.add_folder("user/rows", tmp_path / "data", kind="dataset")
    loaded = datasets.load_dataset("user/rows", split="train", streaming=streaming)
    assert [row["text"] for row in loaded] == ["a", "b", "c"]


def test_images_are_loaded_from_it_by_the_name_of_the_repository(hub, tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for label in ("cat", "dog"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = np.full((8, 8, 3), index, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / label / f"{index}.png")
    hub.add_folder("user/images", tmp_path / "data", kind="dataset")
    loaded = load_image_dataset("user/images", seed=0)
    assert loaded["test"].num_rows == 4
    assert loaded["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize("status", ["401", "403", "409", "429", "500"])
def test_a_status_on_request(hub, status):
    hub.add_repository("user/name", CONTENT)
    hub.fail(status, path="GET /api/models/user/name$", times=1)
    api = HfApi()
    with pytest.raises(HfHubHTTPError) as failure:
        api.model_info("user/name")
    assert failure.value.response.status_code == int(status)
    assert api.model_info("user/name").id == "user/name"


def test_a_connection_is_cut_refused_or_hangs(hub):
    hub.add_repository("user/name", CONTENT)
    url = f"{hub.url}/user/name/resolve/main/sub/weights.safetensors"
    hub.fail("cut", path="GET .*weights", times=1)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url)
    hub.fail("hang", path="GET .*weights", times=1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(url, timeout=0.2)
    assert httpx.get(url).content == CONTENT["sub/weights.safetensors"]
    hub.fail("refuse", path="GET")
    with pytest.raises(httpx.TransportError):
        httpx.get(url)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    hub.recover()
    assert httpx.get(url).content == CONTENT["sub/weights.safetensors"]
    with pytest.raises(ValueError, match="kind is 'fire'; it must be one of refuse, hang"):
        hub.fail("fire")


def test_the_newer_upload_path_goes_through_when_no_file_is_large(monkeypatch, tmp_path):
    with HubStandIn(large_files=False) as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        hub.add_repository("user/name")
        HfApi().upload_folder(repo_id="user/name", folder_path=write_folder(tmp_path / "up"))
        assert hub.files("user/name") == CONTENT


def test_another_process_finds_it_by_its_environment(tmp_path):
    with HubStandIn() as hub:
        hub.add_repository("user/name", CONTENT, private=True)
        code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('user/name', 'config.json'))"
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT["config.json"]
    assert str(tmp_path) in done.stdout
