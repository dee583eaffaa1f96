"""The data sets of the catalogue through the real loader and client, from a stand-in for the Hub."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Value

from bissl_hf.data.catalogue import CATALOGUE, CatalogueEntry
from bissl_hf.data.schema import class_names, is_multi_label
from bissl_hf.data.sources import load_image_dataset
from tests.hub_stand_in import OTHER_TOKEN, HubStandIn

from .hub_parquet import make_split, serve

# Two images per class; ImageNet has enough classes as it is.
SMALL_ROWS = {"train": 2, "validation": 1, "test": 1, "unlabeled": 1}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as hub:
        hub.patch(monkeypatch, tmp_path / "home")
        yield hub


def small_entry(monkeypatch: pytest.MonkeyPatch, name: str) -> CatalogueEntry:
    """The entry with a few images per class, in the place of the real one."""
    entry = CATALOGUE[name]
    rows = {split: SMALL_ROWS[split] * entry.num_classes for split in entry.rows}
    monkeypatch.setitem(CATALOGUE, name, replace(entry, rows=rows))
    return CATALOGUE[name]


def splits_of(entry: CatalogueEntry, rows: Mapping[str, int] | None = None) -> dict[str, Dataset]:
    return {split: make_split(entry, count) for split, count in (rows or entry.rows).items()}


def label_of(image: object) -> int:
    return int(np.asarray(image)[0, 0, 0])


@pytest.mark.parametrize("name", [name for name in CATALOGUE if name != "imagenet"])
def test_every_name_is_loaded_in_the_schema(hub, monkeypatch, caplog, name) -> None:
    entry = small_entry(monkeypatch, name)
    # Splits that are not asked for, among them some whose names begin alike.
    also = {"train_0": make_split(entry, 3), "contrast": make_split(entry, 2)} if entry.data_files else None
    serve(hub, entry, splits_of(entry), also=also)
    with caplog.at_level(logging.INFO):
        loaded = load_image_dataset(name)
    expected = {"train", "validation", "test", *(["unlabeled"] if "unlabeled" in entry.rows else [])}
    assert set(loaded) == expected
    # One of each class; of images with several classes one of each that is the rarest of an image.
    carved = 0 if "validation" in entry.rows else entry.num_classes - entry.multi_label
    assert len(loaded["train"]) == entry.rows["train"] - carved
    assert len(loaded["validation"]) == entry.rows.get("validation", carved)
    assert len(loaded["test"]) == entry.rows["test"]
    assert is_multi_label(loaded["train"]) == entry.multi_label
    assert class_names(loaded["train"]) == [f"class {number}" for number in range(entry.num_classes)]
    for split in ("train", "validation", "test"):
        assert loaded[split].column_names == ["image", "label"]
    for row in loaded["test"].select(range(5)):
        number = label_of(row["image"])
        several = sorted({number, (number + 1) % entry.num_classes})
        assert row["label"] == (several if entry.multi_label else number)
    commit = hub.commits(entry.repository, kind="dataset")[-1].oid
    assert f"{name!r} was read from the commit {commit} of {entry.repository}" in caplog.text


def test_only_the_files_that_are_needed_are_fetched(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "stl10")
    serve(hub, entry, splits_of(entry), also={f"train_{fold}": make_split(entry, 3) for fold in range(10)})
    load_image_dataset("stl10")
    fetched = {request.path.rsplit("/", 1)[-1] for request in hub.requests if ".parquet" in request.path}
    assert {name.split("-")[0] for name in fetched} == {"train", "test", "unlabeled"}


def test_stl10_has_its_unlabelled_images(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "stl10")
    serve(hub, entry, {**splits_of(entry), "unlabeled": make_split(entry, 10, labelled=False)})
    unlabeled = load_image_dataset("stl10")["unlabeled"]
    assert unlabeled.column_names == ["image"]
    assert [label_of(image) for image in unlabeled["image"]] == list(range(10))


def test_validation_split_of_voc2007_is_used_where_there_is_one(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "voc2007")
    serve(hub, entry, {**splits_of(entry), "validation": make_split(entry, 33)})
    loaded = load_image_dataset("voc2007")
    assert {split: len(dataset) for split, dataset in loaded.items()} == {"train": 40, "validation": 33, "test": 20}


def test_another_revision_is_read_if_it_is_asked_for(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "dtd")
    serve(hub, replace(entry, revision="next"), splits_of(entry))
    assert len(load_image_dataset("dtd", revision="next")["test"]) == 47
    with pytest.raises(ValueError, match=f"'tanganke/dtd' has no revision '{entry.revision}' on the Hub: pass a"):
        load_image_dataset("dtd")


def test_a_gated_set_needs_a_token_of_someone_who_accepted(hub, monkeypatch, tmp_path) -> None:
    entry = replace(small_entry(monkeypatch, "imagenet"), num_classes=4, rows={"train": 8, "test": 4})
    monkeypatch.setitem(CATALOGUE, "imagenet", entry)
    serve(hub, entry, splits_of(entry), gated=True)
    message = (
        "'ILSVRC/imagenet-1k' is gated on the Hub: accept its terms at "
        "https://huggingface.co/datasets/ILSVRC/imagenet-1k, then log in with `hf auth login` or set HF_TOKEN"
    )
    for token in (None, OTHER_TOKEN):
        hub.patch(monkeypatch, tmp_path / "home", token)
        with pytest.raises(ValueError, match=message) as refusal:
            load_image_dataset("imagenet")
        assert "\n" not in str(refusal.value)
    hub.repositories["dataset", entry.repository].granted.add("somebody")
    assert len(load_image_dataset("imagenet")["test"]) == 4


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def test_a_set_whose_hub_does_not_answer(hub, monkeypatch) -> None:
    hub.stop()
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts
    with pytest.raises(ValueError, match=r"'timm/oxford-iiit-pet' .* the Hub could not be reached: .* give a folder"):
        load_image_dataset("pets")


def test_a_set_that_is_offline(hub, monkeypatch) -> None:
    go_offline(monkeypatch)
    with pytest.raises(ValueError, match=r"not in the cache of `datasets`.*unset HF_HUB_OFFLINE if it is set"):
        load_image_dataset("pets")


def test_a_set_that_was_loaded_before_is_read_from_the_cache_when_offline(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "pets")
    serve(hub, entry, splits_of(entry))
    load_image_dataset("pets")
    hub.stop()
    go_offline(monkeypatch)
    assert len(load_image_dataset("pets")["test"]) == 37


def test_a_repository_that_is_gone_or_private(hub, monkeypatch, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"'timm/oxford-iiit-pet' is no file .* no data set on the Hub that you may"):
        load_image_dataset("pets")
    entry = small_entry(monkeypatch, "pets")
    serve(hub, entry, splits_of(entry), private=True)
    hub.patch(monkeypatch, tmp_path / "home", None)
    with pytest.raises(ValueError, match="log in with `hf auth login` if it is private"):
        load_image_dataset("pets")


@pytest.mark.parametrize(
    ("name", "column", "renamed", "message"),
    [
        (
            "cifar100",
            "fine_label",
            "label",
            r"split 'train' of 'cifar100' \(uoft-cs/cifar100 .* \['fine_label'\] must",
        ),
        ("cifar10", "img", "image", r"has the columns \['image', 'extra', 'label'\]; \['img'\] must be among them"),
    ],
)
def test_a_moved_column(hub, monkeypatch, name, column, renamed, message) -> None:
    entry = small_entry(monkeypatch, name)
    serve(hub, entry, {split: data.rename_column(column, renamed) for split, data in splits_of(entry).items()})
    with pytest.raises(ValueError, match=message) as refusal:
        load_image_dataset(name)
    assert "pass a revision that fits, or its id instead of the short name" in str(refusal.value)


def test_another_number_of_images(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "cub200")
    serve(hub, entry, splits_of(entry, {"train": 400, "test": 199}))
    with pytest.raises(ValueError, match=r"The split 'test' of 'cub200' .* has 199 images; there must be 200\. The"):
        load_image_dataset("cub200")


@pytest.mark.parametrize("images", [202, 206])
def test_numbers_that_are_known_roughly_may_differ_a_little(hub, monkeypatch, images) -> None:
    entry = small_entry(monkeypatch, "caltech101")
    serve(hub, entry, splits_of(entry, {"train": images, "test": 102}))
    assert len(load_image_dataset("caltech101")["test"]) == 102


@pytest.mark.parametrize("images", [201, 207])
def test_numbers_that_are_known_roughly_may_not_differ_much(hub, monkeypatch, images) -> None:
    entry = small_entry(monkeypatch, "caltech101")
    serve(hub, entry, splits_of(entry, {"train": images, "test": 102}))
    with pytest.raises(ValueError, match=f"has {images} images; there must be about 204"):
        load_image_dataset("caltech101")


def test_a_missing_split(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "flowers102")
    serve(hub, entry, splits_of(entry, {"train": 204, "test": 102}))
    with pytest.raises(ValueError, match=r"has the splits \['test', 'train'\]; \['validation'\] must be among them"):
        load_image_dataset("flowers102")


def test_another_number_of_classes(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "dtd")
    serve(hub, entry, splits_of(replace(entry, num_classes=46), entry.rows))
    with pytest.raises(ValueError, match=r"'dtd' \(tanganke/dtd\) has 46 classes; there must be 47"):
        load_image_dataset("dtd")


@pytest.mark.parametrize(
    ("name", "there", "expected"), [("voc2007", "a class", "lists of"), ("dtd", "lists", "a class")]
)
def test_several_labels_where_one_is_expected_and_the_other_way_round(hub, monkeypatch, name, there, expected) -> None:
    entry = small_entry(monkeypatch, name)
    serve(hub, entry, splits_of(replace(entry, multi_label=not entry.multi_label), entry.rows))
    with pytest.raises(ValueError, match=f"are {there}.* per image; there must be {expected}"):
        load_image_dataset(name)


def test_classes_without_names_are_numbered(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "dtd")
    serve(hub, entry, {split: data.cast_column("label", Value("int64")) for split, data in splits_of(entry).items()})
    assert class_names(load_image_dataset("dtd")["train"]) == [str(number) for number in range(47)]


def test_another_column_of_labels_is_not_held_against_the_classes(hub, monkeypatch) -> None:
    entry = small_entry(monkeypatch, "cifar100")
    coarse = replace(entry, num_classes=20, label_column="coarse_label")
    splits = {
        split: data.add_column("coarse_label", make_split(coarse, len(data))["coarse_label"][:])
        for split, data in splits_of(entry).items()
    }
    serve(hub, entry, splits)
    assert len(class_names(load_image_dataset("cifar100", label_column="coarse_label")["train"])) == 20


def test_a_name_goes_before_a_folder_of_that_name(hub, monkeypatch, tmp_path, caplog) -> None:
    entry = small_entry(monkeypatch, "pets")
    serve(hub, entry, splits_of(entry))
    (tmp_path / "pets").mkdir()
    monkeypatch.chdir(tmp_path)
    assert len(load_image_dataset("pets")["test"]) == 37
    assert "'pets' is taken as the data set of this name; for the one here write './pets'" in caplog.text


@pytest.mark.slow
def test_every_name_is_loaded_with_its_real_number_of_images(hub) -> None:
    """Rows of a few bytes each; nothing of the catalogue is changed for it. ImageNet alone would double the time."""
    for name, entry in CATALOGUE.items():
        if name == "imagenet":
            continue
        serve(hub, entry, splits_of(entry))
        loaded = load_image_dataset(name)
        found = {split: len(dataset) for split, dataset in loaded.items()}
        if "validation" not in entry.rows:
            found["train"] += found.pop("validation")
        assert found == dict(entry.rows)
