"""Folders as other people make them: splits, classes, metadata, and what is left out."""

import errno
import json
import logging
import os
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from datasets import Dataset, Image
from datasets.exceptions import DatasetGenerationError

from bissl_hf.data.paths import count_endings
from bissl_hf.data.sources import load_image_dataset


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(root: Path, counts: dict[str, int], ending: str = ".png") -> Path:
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            path = root / folder / f"{number:02d}.png"
            PIL.Image.fromarray(np.full((4, 4, 3), number, dtype=np.uint8)).save(path)
            path.rename(path.with_name(f"{number:02d}{ending}"))
    return root


def read(root: Path, **options) -> tuple[dict[str, int], list[str]]:
    """Returns the numbers of images of what the source itself has, and the classes."""
    splits = load_image_dataset(root, **options)
    return {name: len(split) for name, split in splits.items()}, splits["train"].features["label"].names


class TestSplits:
    @pytest.mark.parametrize(
        "names",
        [
            ("seg_train", "seg_test"),
            ("training_set", "test_set"),
            ("Train", "evaluation"),
            ("train-2019", "test-2019"),
            ("archive/seg_train/seg_train", "archive/seg_test/seg_test"),
            ("deep/deeper/train", "deep/deeper/test"),
        ],
    )
    def test_names_of_splits_by_the_rule_of_datasets(self, tmp_path, names):
        for name, count in zip(names, (10, 3), strict=True):
            write(tmp_path, {f"{name}/cat": count, f"{name}/dog": count})
        assert read(tmp_path) == ({"train": 18, "validation": 2, "test": 6}, ["cat", "dog"])

    @pytest.mark.parametrize("names", [("seg_train", "seg_test"), ("training_set", "test_set"), ("a/train", "a/test")])
    def test_splits_are_those_of_imagefolder(self, tmp_path, names):
        for name, count in zip(names, (10, 3), strict=True):
            write(tmp_path, {f"{name}/cat": count, f"{name}/dog": count})
        theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path))
        ours = load_image_dataset(tmp_path)
        assert theirs["train"].features["label"].names == ours["train"].features["label"].names
        assert len(theirs["test"]) == len(ours["test"])
        assert len(theirs["train"]) == len(ours["train"]) + len(ours["validation"])

    def test_file_names_tell_splits_where_all_of_them_do(self, tmp_path):
        for number in range(10):
            for name in ("cat", "dog"):
                write(tmp_path, {name: 0})
                split = "train" if number < 7 else "test"
                PIL.Image.new("RGB", (4, 4)).save(tmp_path / name / f"{split}_{number}.png")
        assert read(tmp_path)[0] == {"train": 12, "validation": 2, "test": 6}
        (tmp_path / "cat" / "train_0.png").rename(tmp_path / "cat" / "first.png")
        assert sum(read(tmp_path)[0].values()) == 20

    def test_a_wrapping_folder_is_no_class(self, tmp_path):
        write(tmp_path, {"photos/cat": 10, "photos/dog": 10})
        assert read(tmp_path)[1] == ["cat", "dog"]

    def test_classes_whose_names_contain_a_split(self, tmp_path):
        write(tmp_path, {"bullet train": 10, "car": 10, "test tube": 10})
        assert read(tmp_path)[1] == ["bullet train", "car", "test tube"]

    def test_a_class_called_train_in_the_training_split(self, tmp_path):
        write(tmp_path, {"train/train": 10, "train/bus": 10, "test/train": 2, "test/bus": 2})
        assert read(tmp_path) == ({"train": 18, "validation": 2, "test": 4}, ["bus", "train"])

    @pytest.mark.parametrize("required", [True, False])
    def test_a_class_called_like_a_split_is_asked_about(self, tmp_path, required):
        write(tmp_path, {"bus": 3, "car": 3, "train": 3})
        with pytest.raises(ValueError, match=r"has \['train'\], which name splits, beside 'bus', 'car': put the"):
            load_image_dataset(tmp_path, require_labels=required)

    def test_splits_inside_classes_are_asked_about(self, tmp_path):
        write(tmp_path, {"cat/train": 3, "cat/test": 3, "dog/train": 3, "dog/test": 3})
        with pytest.raises(ValueError, match=r"cat' has \['test', 'train'\], which name splits, inside what would be"):
            load_image_dataset(tmp_path)

    def test_two_levels_of_classes_are_asked_about(self, tmp_path):
        write(tmp_path, {"real/cat": 3, "real/dog": 3, "sketch/cat": 3, "sketch/dog": 3})
        with pytest.raises(ValueError, match="such as 'cat' and 'dog' in 'real', and either level may be the classes"):
            load_image_dataset(tmp_path)

    def test_one_folder_inside_each_class_is_none(self, tmp_path):
        write(tmp_path, {"n01/images": 5, "n02/images": 5})
        assert read(tmp_path)[1] == ["n01", "n02"]

    def test_an_empty_split_is_named(self, tmp_path):
        write(tmp_path, {"train/a": 3, "test": 0})
        write(tmp_path / "test", {".": 2}, ".heic")
        with pytest.raises(ValueError, match=r"no images in .*test', whose 2 files \(2 of .heic\) cannot be read as"):
            load_image_dataset(tmp_path)


class TestLeftOut:
    def test_told_once_by_count_and_ending(self, tmp_path, caplog):
        write(tmp_path, {"cat": 10, "dog": 10})
        write(tmp_path, {"fox": 8, "__background__": 2}, ".heic")
        write(tmp_path, {"dog/more": 3}, ".png?w=640")
        write(tmp_path, {"dog/none": 2}, "")
        write(tmp_path, {"__pycache__": 2, "cat/.hidden": 2})
        (tmp_path / "cat" / "._00.png").write_bytes(b"AppleDouble")
        (tmp_path / "cat" / ".DS_Store").write_bytes(b"")
        with caplog.at_level(logging.WARNING):
            sizes, names = read(tmp_path)
        assert (sum(sizes.values()), names) == (20, ["cat", "dog"])
        (told,) = [record.message for record in caplog.records if "Left out" in record.message]
        assert "15 files (10 of .heic, 3 of .png?..., 2 without an ending)" in told
        assert "folders ['__background__', 'dog/more', 'dog/none', 'fox']" in told

    def test_nothing_is_told_of_a_clean_folder(self, tmp_path, caplog):
        write(tmp_path, {"cat": 10, "dog": 10})
        with caplog.at_level(logging.WARNING):
            load_image_dataset(tmp_path)
        assert "Left out" not in caplog.text

    @pytest.mark.parametrize("ending", [".PNG", ".JpEg", ".tga", ".apng", ".jpe", ".avif", ".ico"])
    def test_endings_that_datasets_reads(self, tmp_path, ending):
        write(tmp_path, {"cat": 5, "dog": 5}, ending)
        assert sum(read(tmp_path)[0].values()) == 10

    def test_folder_of_other_files_says_what_it_holds(self, tmp_path):
        write(tmp_path, {"cat": 5}, ".heic")
        with pytest.raises(
            ValueError, match=r"There are no images in .*, whose 5 files \(5 of .heic\) cannot be read"
        ):
            load_image_dataset(tmp_path)

    def test_many_endings_are_summed_up(self):
        paths = [Path(f"a.{'abcdefgh'[number]}") for number in range(8)] + [Path("b.a?x=1"), Path("c?v=1.2")]
        assert count_endings(paths).startswith("10 files (1 of .a, 1 of .b")
        assert count_endings(paths).endswith("other endings)")
        assert count_endings([Path("x.TXT")]) == "1 file (1 of .txt)"


@pytest.mark.parametrize("name", [b"cat/\xff\xfe.png", b"\xe9t\xe9/0.png"], ids=["file", "folder"])
def test_a_name_that_is_not_unicode_is_shown(tmp_path, name):
    write(tmp_path, {"cat": 3, "dog": 3})
    path = os.fsencode(tmp_path) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "new.png")
    os.rename(tmp_path / "new.png", path)
    with pytest.raises(ValueError, match=r"The name of the image b'.*\\x.*' is not UTF-8"):
        load_image_dataset(tmp_path)


class TestMetadata:
    def rows(self, names: list[str], **more) -> pd.DataFrame:
        return pd.DataFrame({"file_name": names, "label": ["ab"[i % 2] for i in range(len(names))], **more})

    def store(self, table: pd.DataFrame, path: Path) -> None:
        if path.suffix == ".csv":
            table.to_csv(path, index=False)
        elif path.suffix == ".parquet":
            table.to_parquet(path)
        else:
            path.write_text("\n".join(map(json.dumps, table.to_dict("records"))))

    @pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
    def test_labels_come_from_it_as_in_imagefolder(self, tmp_path, ending):
        write(tmp_path, {"images": 20})
        self.store(self.rows([f"images/{i:02d}.png" for i in range(20)]), tmp_path / f"metadata{ending}")
        found = {}
        for split in load_image_dataset(tmp_path).values():
            for image, label in zip(split["image"], split["label"], strict=True):
                found[np.asarray(image).flat[0].item()] = split.features["label"].int2str(label)
        assert found == {number: "ab"[number % 2] for number in range(20)}
        if ending != ".csv":  # datasets 5.2 leaves that file open
            theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path))["train"]
            pairs = zip(theirs["image"], theirs["label"], strict=True)
            assert found == {np.asarray(image).flat[0].item(): label for image, label in pairs}

    def test_it_wins_over_folders_and_tells_what_it_does_not_list(self, tmp_path, caplog):
        write(tmp_path, {"x": 12, "y": 12})
        self.store(self.rows([f"x/{i:02d}.png" for i in range(12)]), tmp_path / "metadata.csv")
        with caplog.at_level(logging.WARNING):
            assert read(tmp_path)[1] == ["a", "b"]
        assert "12 files (12 of .png); nothing is read of the folders ['y']" in caplog.text

    def test_one_file_for_all_splits(self, tmp_path):
        write(tmp_path, {"train": 10, "test": 4})
        names = [f"{split}/{i:02d}.png" for split, count in (("train", 10), ("test", 4)) for i in range(count)]
        self.store(self.rows(names), tmp_path / "metadata.csv")
        assert read(tmp_path)[0] == {"train": 8, "validation": 2, "test": 4}

    def test_one_file_for_all_splits_lists_a_lost_image(self, tmp_path):
        write(tmp_path, {"train": 10, "test": 4})
        self.store(self.rows(["train/00.png", "train/lost.png"]), tmp_path / "metadata.csv")
        with pytest.raises(ValueError, match=r"1 images that .* lists are not there, .*train/lost.png"):
            load_image_dataset(tmp_path)

    def test_a_file_in_each_split(self, tmp_path):
        write(tmp_path, {"train": 10, "test": 4})
        for split, count in (("train", 10), ("test", 4)):
            self.store(self.rows([f"{i:02d}.png" for i in range(count)]), tmp_path / split / "metadata.jsonl")
        assert read(tmp_path)[0] == {"train": 8, "validation": 2, "test": 4}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                "file_name,label\n00.png,a\nlost.png,b\n",
                r"1 images that .*metadata.csv' lists are not there, .*lost.png",
            ),
            ("name,label\n00.png,a\n", r"has the columns \['name', 'label'\]; one of them must be 'file_name'"),
            ("file_name,label\n,a\n", "has no 'file_name' in row 0"),
            ("", r"metadata.csv' cannot be read: No columns to parse from file"),
        ],
    )
    def test_errors(self, tmp_path, content, message):
        write(tmp_path, {".": 2})
        (tmp_path / "metadata.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_image_dataset(tmp_path)

    def test_a_table_of_another_name_is_asked_about(self, tmp_path):
        write(tmp_path, {".": 2})
        (tmp_path / "labels.csv").write_text("id,label\n00.png,a\n")
        with pytest.raises(ValueError, match=r"list them in a metadata.csv with the columns 'file_name' and 'label'"):
            load_image_dataset(tmp_path)


def table(rows: int = 20, offset: int = 0) -> Dataset:
    images = [PIL.Image.fromarray(np.full((4, 4, 3), row + offset, dtype=np.uint8)) for row in range(rows)]
    return Dataset.from_dict({"image": images, "label": ["a", "b"] * (rows // 2)}).cast_column("image", Image())


class TestParquetFolders:
    @pytest.mark.parametrize(
        "hidden", [".ipynb_checkpoints/train-copy.parquet", "._train.parquet", "__MACOSX/train.parquet"]
    )
    def test_hidden_copies_are_not_read(self, tmp_path, hidden):
        for name in ("train.parquet", hidden):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            table().to_parquet(tmp_path / name)
        assert sum(read(tmp_path)[0].values()) == 20

    @pytest.mark.parametrize(
        "names", [("full/train-0.parquet", "mini/train-0.parquet"), ("full/0.parquet", "mini/0.parquet")]
    )
    def test_configurations_without_a_readme_are_asked_about(self, tmp_path, names):
        for name in names:
            (tmp_path / name).parent.mkdir()
            table().to_parquet(tmp_path / name)
        with pytest.raises(
            ValueError, match=r"in the folders \['full', 'mini'\], which may be several configurations"
        ):
            load_image_dataset(tmp_path)

    def test_parts_of_a_table_are_none(self, tmp_path):
        for name in ("train/year=2023/0.parquet", "train/year=2024/0.parquet", "seg_test/x/0.parquet"):
            (tmp_path / name).parent.mkdir(parents=True)
            table().to_parquet(tmp_path / name)
        assert read(tmp_path)[0] == {"train": 36, "validation": 4, "test": 20}

    @pytest.mark.parametrize(("images", "message"), [(3, "holds 3 images and 1 Parquet files"), (1, None)])
    def test_images_beside_parquet_files(self, tmp_path, caplog, images, message):
        write(tmp_path, {"assets": images})
        table().to_parquet(tmp_path / "train.parquet")
        if message:
            with pytest.raises(ValueError, match=message):
                load_image_dataset(tmp_path)
        else:
            assert sum(read(tmp_path)[0].values()) == 20
            assert "The 1 images in" in caplog.text


class TestConfigurations:
    def make(self, root: Path, head: str) -> None:
        for config, rows in (("full", 20), ("mini", 10)):
            (root / config).mkdir()
            table(rows).to_parquet(root / config / "train-00000-of-00001.parquet")
        (root / "README.md").write_text(f"---\n{head}---\n# Data\n")

    HEAD = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        for name in ("full", "mini")
    )

    def test_several_are_asked_about_and_one_can_be_chosen(self, tmp_path):
        self.make(tmp_path, f"configs:\n{self.HEAD}")
        with pytest.raises(
            ValueError, match=r"has several configurations; choose one of \['full', 'mini'\] with `dat"
        ):
            load_image_dataset(tmp_path)
        with pytest.raises(ValueError, match="has no configuration 'small'; choose one of"):
            load_image_dataset(tmp_path, dataset_config="small")
        assert sum(read(tmp_path, dataset_config="mini")[0].values()) == 10

    def test_a_default_is_taken(self, tmp_path):
        self.make(tmp_path, f"configs:\n{self.HEAD}  default: true\n")
        assert sum(read(tmp_path)[0].values()) == 10

    def test_files_that_are_not_there(self, tmp_path):
        self.make(tmp_path, f"configs:\n{self.HEAD}".replace("mini/train", "mini/lost"))
        with pytest.raises(ValueError, match=r"The configuration 'mini' of the data set in .* cannot be loaded: "):
            load_image_dataset(tmp_path, dataset_config="mini")

    def test_a_broken_head(self, tmp_path):
        self.make(tmp_path, "configs: [\n")
        with pytest.raises(ValueError, match=r"The head of .*README.md' is not valid YAML"):
            load_image_dataset(tmp_path)

    def test_none_to_choose(self, tmp_path):
        write(tmp_path, {"a": 3, "b": 3})
        with pytest.raises(ValueError, match=r"The configuration 'x' is asked for, and .* has none"):
            load_image_dataset(tmp_path, dataset_config="x")


class TestCache:
    def test_a_cache_that_cannot_be_written_is_not_the_fault_of_the_data(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
        (tmp_path / "data").mkdir()
        table().to_parquet(tmp_path / "data" / "train.parquet")
        with pytest.raises(
            ValueError, match=r"The cache folder '.*file/cache' cannot be written: .* set HF_DATASETS_"
        ):
            load_image_dataset(tmp_path / "data")

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    @pytest.mark.parametrize("source", ["parquet", "hub"])
    def test_a_full_cache_neither(self, tmp_path, monkeypatch, number, source):
        def full(*args: object, **options: object) -> None:
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise DatasetGenerationError("An error occurred while generating the dataset") from error

        monkeypatch.setattr(f"bissl_hf.data.{'files' if source == 'parquet' else 'hub'}.load_dataset", full)
        table().to_parquet(tmp_path / "train.parquet")
        with pytest.raises(
            ValueError, match=r"The cache folder .* has no room: [0-9,]+ are free; set HF_DATASETS_CACHE"
        ):
            load_image_dataset(tmp_path / "train.parquet" if source == "parquet" else "user/name")


def test_no_labels_are_needed_though_another_split_has_some(tmp_path):
    write(tmp_path, {"train": 4, "test/a": 1})
    assert len(load_image_dataset(tmp_path, require_labels=False)["unlabeled"]) == 4


class TestPaths:
    def test_home_and_variables(self, tmp_path, monkeypatch):
        write(tmp_path, {"data/a": 5, "data/b": 5})
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("PLACE", str(tmp_path))
        for name in ("~/data", "$PLACE/data", "${PLACE}/data"):
            assert read(name)[1] == ["a", "b"]

    def test_errors(self, monkeypatch):
        monkeypatch.delenv("PLACE", raising=False)
        with pytest.raises(ValueError, match=r"the environment variable \$PLACE is not set"):
            load_image_dataset("$PLACE/data")
        with pytest.raises(ValueError, match="there is no user '~nobody-of-this-name'"):
            load_image_dataset("~nobody-of-this-name/data")
        with pytest.raises(ValueError, match="The name of the data set is empty"):
            load_image_dataset(" ")


class TestRunsAmongTheData:
    @pytest.mark.parametrize("root", [".", "out"])
    def test_figures_of_a_run_are_no_images(self, tmp_path, root):
        write(tmp_path, {"cat": 4, "dog": 4, "out/figures": 1})
        assert read(tmp_path)[1] == ["cat", "dog", "out"]
        (tmp_path / "out" / "all_results.json").write_text("{}")
        with pytest.raises(ValueError, match=r"out' is the output folder of a run, .*move it out of the data"):
            load_image_dataset(tmp_path / root)

    def test_results_without_images_are_left_out(self, tmp_path):
        write(tmp_path, {"cat": 4, "dog": 4})
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "all_results.json").write_text("{}")
        assert read(tmp_path)[1] == ["cat", "dog"]
