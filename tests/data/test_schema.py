"""Columns as other tools write them, and labels of every kind."""

import logging
import unicodedata
from io import BytesIO

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bissl_hf.data.schema import class_names, encode_labels, labels_of, split_in_name
from bissl_hf.data.sources import load_image_dataset


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def png(value: int) -> bytes:
    buffer = BytesIO()
    PIL.Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def splits_of(labels: dict[str, list], feature: object) -> dict[str, Dataset]:
    features = Features({"image": Image(), "kind": feature})
    return {
        split: Dataset.from_dict(
            {"image": [{"bytes": b"x", "path": None}] * len(values), "kind": values}, features=features
        )
        for split, values in labels.items()
    }


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)


class TestArrowTypes:
    @pytest.mark.parametrize("images", [pa.binary(), pa.large_binary(), pa.binary_view(), "struct", "struct of views"])
    @pytest.mark.parametrize("labels", [pa.string(), pa.large_string(), pa.string_view(), "dictionary"])
    def test_bytes_and_labels(self, tmp_path, images, labels):
        contents = [png(row) for row in range(20)]
        if isinstance(images, str):
            kinds = (pa.binary_view(), pa.string_view()) if "views" in images else (pa.binary(), pa.large_string())
            struct = pa.struct([("bytes", kinds[0]), ("path", kinds[1])])
            column = pa.array([{"bytes": content, "path": None} for content in contents], struct)
        else:
            column = pa.array(contents, images)
        names = pa.array(["cat", "dog"] * 10)
        names = names.dictionary_encode() if labels == "dictionary" else names.cast(labels)
        pyarrow.parquet.write_table(pa.table({"image": column, "label": names}), tmp_path / "t.parquet")
        loaded = load_image_dataset(tmp_path / "t.parquet")
        found = {
            np.asarray(image).flat[0].item(): split.features["label"].int2str(label)
            for split in loaded.values()
            for image, label in zip(split["image"], split["label"], strict=True)
        }
        assert found == {row: ["cat", "dog"][row % 2] for row in range(20)}

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
    def test_paths(self, tmp_path, kind):
        for row in range(20):
            (tmp_path / f"{row}.png").write_bytes(png(row))
        paths = pa.array([str(tmp_path / f"{row}.png") for row in range(20)], kind)
        table = pa.table({"image": paths, "label": pa.array([0.0, 1.0] * 10)})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        loaded = load_image_dataset(tmp_path / "t.parquet")
        assert sum(map(len, loaded.values())) == 20
        assert loaded["train"].features["label"].names == ["0", "1"]

    def test_lists_of_views(self, tmp_path):
        lists = pa.array([["a", "b"], ["b"]] * 10, pa.list_(pa.string_view()))
        table = pa.table({"image": pa.array([png(row) for row in range(20)], pa.binary()), "label": lists})
        pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
        assert load_image_dataset(tmp_path / "t.parquet")["train"].features["label"] == List(
            ClassLabel(names=["a", "b"])
        )


class TestLabels:
    @pytest.mark.parametrize(
        ("labels", "feature", "expected"),
        [
            ([0.0, 1.0, 2.0], Value("float64"), [0, 1, 2]),
            ([True, False, True], Value("bool"), [1, 0, 1]),
            ([1, 0, 2], Value("uint8"), [1, 0, 2]),
            ([[0.0, 1.0], [], [1.0]], List(Value("float32")), [[1, 1], [0, 0], [0, 1]]),
        ],
    )
    def test_whole_numbers(self, labels, feature, expected):
        encoded = encode_labels("x", splits_of({"train": labels}, feature), "image", "kind")["train"]
        np.testing.assert_array_equal(labels_of(encoded), expected)

    def test_integers_and_whole_floats_are_the_same(self):
        splits = splits_of({"train": [0, 1, 2]}, Value("int64")) | splits_of({"test": [2.0]}, Value("float64"))
        assert labels_of(encode_labels("x", splits, "image", "kind")["test"]).tolist() == [2]

    @pytest.mark.parametrize(
        ("labels", "message"), [([0.0, 0.5], "labels must be class"), ([0.0, np.nan], "no label in row 1")]
    )
    def test_other_floats(self, labels, message):
        with pytest.raises(ValueError, match=message):
            encode_labels("x", splits_of({"train": labels}, Value("float64")), "image", "kind")

    def test_a_huge_number_takes_no_memory(self):
        splits = splits_of({"train": [0, 10**12]}, Value("int64"))
        with pytest.raises(ValueError, match=r"reach 1000000000000, and none is 1; whole numbers"):
            encode_labels("x", splits, "image", "kind")

    @pytest.mark.parametrize(
        ("labels", "message"),
        [(["cat", " "], "There is no label in row 1"), (["dog", "dog "], "classes 'dog' and 'dog ', which differ by")],
    )
    def test_blanks_are_no_names(self, labels, message):
        with pytest.raises(ValueError, match=message):
            encode_labels("x", splits_of({"train": labels}, Value("string")), "image", "kind")

    def test_one_name_in_two_unicode_forms_is_one_class(self):
        forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
        splits = splits_of({"train": [forms[0], "tea"], "test": [forms[1]]}, Value("string"))
        encoded = encode_labels("x", splits, "image", "kind")
        assert (class_names(encoded["train"]), labels_of(encoded["test"]).tolist()) == ([forms[0], "tea"], [0])
        splits = splits_of({"train": [0, 1]}, ClassLabel(names=[forms[0], "tea"]))
        splits |= splits_of({"test": [0]}, ClassLabel(names=[forms[1], "tea"]))
        assert class_names(encode_labels("x", splits, "image", "kind")["test"]) == [forms[0], "tea"]

    def test_two_classes_of_one_name(self):
        names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
        with pytest.raises(ValueError, match=r"1 classes twice, in two Unicode forms of one name, such as 'caf\\xe9'"):
            encode_labels("x", splits_of({"train": [0, 1]}, ClassLabel(names=names)), "image", "kind")

    @pytest.mark.parametrize("test_labels", [None, [-1, -1], [None, None], [-1.0, np.nan]])
    @pytest.mark.parametrize("split", ["test", "validation"])
    def test_a_split_without_labels_is_left_out(self, monkeypatch, caplog, test_labels, split):
        train = splits_of({"train": [0, 1] * 10}, Value("int64"))["train"]
        feature = Value("float64") if test_labels and isinstance(test_labels[0], float) else Value("int64")
        other = splits_of({"x": test_labels or [0, 0]}, feature)["x"]
        other = other.remove_columns("kind") if test_labels is None else other
        monkeypatch.setattr("bissl_hf.data.hub.load_dataset", lambda name, **options: {"train": train, split: other})
        with caplog.at_level(logging.WARNING):
            loaded = load_image_dataset("user/name", label_column="kind")
        assert f"The split '{split}' of 'user/name' has no labels and is not used" in caplog.text
        assert {name: len(part) for name, part in loaded.items()} == {"train": 16, "validation": 2, "test": 2}

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.one_of(
            st.lists(TEXTS.map(str.strip).filter(bool), min_size=1, max_size=12),
            st.lists(st.booleans(), min_size=1, max_size=12),
            st.integers(1, 6).flatmap(lambda n: st.permutations(list(range(n)) * 2)),
            st.integers(1, 6).flatmap(lambda n: st.permutations([float(i) for i in range(n)] * 2)),
        )
    )
    def test_labels_keep_their_meaning(self, labels):
        """A row's class has the name of its label, whatever its type; equal labels are one class."""
        kind = {str: "string", bool: "bool", int: "int64", float: "float32"}[type(labels[0])]
        if kind == "bool" and set(labels) == {True}:
            labels = [*labels, False]
        encoded = encode_labels("x", splits_of({"train": labels}, Value(kind)), "image", "kind")["train"]
        found = [class_names(encoded)[label] for label in labels_of(encoded)]
        assert found == [
            unicodedata.normalize("NFC", label) if isinstance(label, str) else str(int(label)) for label in labels
        ]
        assert len(set(class_names(encoded))) == len(class_names(encoded))


@settings(max_examples=100, deadline=None)
@given(st.text("abctrainvl-_. 0", max_size=12))
def test_a_name_is_of_one_split_or_none(name):
    words = {"train", "training", "val", "valid"} & set(
        name.replace("-", " ").replace("_", " ").replace(".", " ").replace("0", " ").split()
    )
    found = {"val": "validation", "valid": "validation"}
    meant = {found.get(word, "train") for word in words}
    assert split_in_name(name) == (meant.pop() if len(meant) == 1 else None)
