"""Image data from arguments: which splits are read, and the transforms that the arguments describe."""

from collections.abc import Sequence

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from bissl_hf.cli.images import (
    CropArguments,
    DataArguments,
    ViewArguments,
    build_train_transform,
    build_view_transform,
    load_labelled,
)
from bissl_hf.data.augment import TrainTransform, TwoViewTransform
from bissl_hf.tasks.labelled import decode_labelled, decode_unlabelled

VIEWS = ViewArguments(crop_scale=[0.5, 0.9], crop_ratio=[0.8, 1.2], horizontal_flip=0.3, blur=[0.5, 0.0])


def split(brightness: Sequence[int], labels: Sequence[int] | None) -> datasets.Dataset:
    columns: dict[str, list] = {"image": [Image.new("RGB", (16, 16), (value,) * 3) for value in brightness]}
    features = datasets.Features({"image": datasets.Image()})
    if labels is not None:
        columns["label"] = list(labels)
        features["label"] = datasets.ClassLabel(names=["dark", "light"])
    return datasets.Dataset.from_dict(columns, features=features)


def test_the_digits_are_loaded_by_their_columns() -> None:
    splits = load_labelled(DataArguments(dataset="digits", image_column="image", label_column="label"), seed=0)
    assert {name: len(part) for name, part in splits.items()} == {"train": 1295, "validation": 143, "test": 359}
    with pytest.raises(ValueError, match="no column 'photo'"):
        load_labelled(DataArguments(dataset="digits", image_column="photo"), seed=0)


def test_a_single_class_is_refused(tmp_path) -> None:
    for name in ("train", "test"):
        folder = tmp_path / name / "cat"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("L", (8, 8), number).save(folder / f"{number}.png")
    with pytest.raises(ValueError, match="has a single class, 'cat'; a classifier needs at least two"):
        load_labelled(DataArguments(dataset=str(tmp_path)), seed=0)


def test_training_images_keep_their_size_and_the_others_are_resized() -> None:
    splits = {name: split([10, 200], [0, 1]) for name in ("train", "validation", "test")}
    images = decode_labelled(splits, 14)
    assert [part.image_shape for part in (images.train, images.validation, images.test)] == [
        (3, 16, 16),
        (3, 16, 16),
        (3, 16, 16),
    ]
    small = decode_labelled(splits, 7)
    assert [part.image_shape for part in (small.train, small.validation, small.test)] == [
        (3, 16, 16),
        (3, 8, 8),
        (3, 8, 8),
    ]
    assert small.class_names == ["dark", "light"]
    assert small.test[1]["labels"] == 1


def test_the_pretext_task_reads_unlabelled_images_where_there_are_any() -> None:
    splits = {"train": split([10, 200], [0, 1])}
    rows = decode_unlabelled(splits, 14)
    assert [set(rows[row]) for row in range(2)] == [{"pixel_values"}] * 2
    assert np.allclose([rows[row]["pixel_values"].float().mean() for row in range(2)], [10, 200])
    splits["unlabeled"] = split([7], None)
    assert decode_unlabelled(splits, 14)[0]["pixel_values"].float().mean() == 7


def test_transforms_follow_their_arguments() -> None:
    images = torch.randint(0, 256, (6, 3, 20, 20), dtype=torch.uint8)
    crop = {"crop_scale": (0.5, 0.9), "crop_ratio": (0.8, 1.2), "horizontal_flip": 0.3}
    colours = {"color_jitter": 0.8, "grayscale": 0.2, "blur": (0.5, 0.0), "solarize": (0.0, 0.2)}
    for found, expected in (
        (build_train_transform(16, VIEWS), TrainTransform(16, **crop)),
        (build_view_transform(16, VIEWS), TwoViewTransform(16, **crop, **colours)),
    ):
        outputs = [transform({"pixel_values": images}, (1, 2))["pixel_values"] for transform in (found, expected)]
        assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["crop_scale", "crop_ratio"])
def test_a_range_is_two_numbers(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is \[0.5\]; it must be two numbers, the lower one first"):
        build_train_transform(16, CropArguments(**{name: [0.5]}))


def test_some_training_images_are_chosen_and_all_of_them_stay_for_the_pretext_task() -> None:
    whole = load_labelled(DataArguments(dataset="digits"), seed=3)
    some = load_labelled(DataArguments(dataset="digits", train_examples=50), seed=3)
    assert len(some["train"]) == 50
    assert set(some["train"]["label"]) == set(range(10))
    assert some["unlabeled"].column_names == ["image"]
    assert len(decode_unlabelled(some, 8)) == len(whole["train"])
    for name in ("validation", "test"):
        assert some[name]["label"][:] == whole[name]["label"][:]
    with pytest.raises(ValueError, match="9 labelled examples are asked for; there must be between 10, one per class"):
        load_labelled(DataArguments(dataset="digits", train_examples=9), seed=0)


def test_a_revision_is_for_the_hub() -> None:
    with pytest.raises(ValueError, match=r"\['revision'\] apply to data sets on the Hub only"):
        load_labelled(DataArguments(dataset="digits", dataset_revision="main"), seed=0)


def test_unlabelled_images_are_taken_without_those_of_the_test_split() -> None:
    splits = {"train": split([10, 200, 30], [0, 1, 0])}
    left = decode_unlabelled(splits, 14, without=split([200, 7], None))
    assert [int(left[row]["pixel_values"].float().mean()) for row in range(len(left))] == [10, 30]
    with pytest.raises(ValueError, match="All 3 unlabelled images are test images too; give others with --lower_data"):
        decode_unlabelled(splits, 14, without=split([200, 30, 10], None))


def test_the_kind_of_task_is_that_of_the_labels() -> None:
    one = {name: split([10, 200], [0, 1]) for name in ("train", "validation", "test")}
    assert decode_labelled(one, 14).problem_type == "single_label_classification"
    several = {
        name: datasets.Dataset.from_dict(
            {"image": part["image"][:], "label": [[0], [0, 1]]},
            features=datasets.Features(
                {"image": datasets.Image(), "label": datasets.List(datasets.ClassLabel(names=["dark", "light"]))}
            ),
        )
        for name, part in one.items()
    }
    images = decode_labelled(several, 14)
    assert images.problem_type == "multi_label_classification"
    assert images.class_names == ["dark", "light"]


def test_unreadable_images_stop_or_are_left_out() -> None:
    good = split(range(10), [0, 1] * 5)
    broken = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image", "path": None}], "label": [0]}, features=good.features
    )
    some = datasets.concatenate_datasets([good, broken])
    splits = {"train": some, "validation": good, "test": some}
    with pytest.raises(ValueError, match=r"'train' cannot be read: .*row 10 of the split 'test' cannot be read"):
        decode_labelled(splits, 8)
    images = decode_labelled(splits, 8, unreadable="skip")
    assert (len(images.train), len(images.validation), len(images.test)) == (10, 10, 10)
    assert len(decode_unlabelled(splits, 8, unreadable="skip")) == 10
