"""Choices of rows: the mix of classes, what is nested in what, and several labels per image."""

import logging
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List

from bissl_hf.data.subsets import carve_split, strata_of, stratified_rows, take_examples


def split_of(labels: list, *, several: bool = False) -> Dataset:
    names = ClassLabel(names=["a", "b", "c", "d"])
    images = [PIL.Image.new("L", (1, 1), row % 256) for row in range(len(labels))]
    features = Features({"image": Image(), "label": List(names) if several else names})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


class TestStratifiedRows:
    def test_fraction_of_each_class(self):
        labels = np.repeat([0, 1, 2], [100, 20, 4])
        first, second, single = stratified_rows(labels, 0.1, seed=3)
        assert np.bincount(labels[second]).tolist() == [10, 2, 1]
        assert sorted([*first, *second]) == list(range(124))
        assert single == []

    def test_class_with_one_row_stays_in_first_part(self):
        first, second, single = stratified_rows([0, 0, 7], 0.9, seed=0)
        assert single == [7]
        assert 2 in first
        assert len(first) == 2
        assert len(second) == 1


class TestTakeExamples:
    LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [140, 50, 10])).tolist()

    @pytest.mark.parametrize(
        ("count", "expected"),
        # Shares of 0.7, 0.25 and 0.05; at least one of each class.
        [(3, [1, 1, 0, 1]), (20, [14, 5, 0, 1]), (100, [70, 25, 0, 5]), (200, [140, 50, 0, 10])],
    )
    def test_classes_keep_their_shares(self, count, expected):
        taken = take_examples(split_of(self.LABELS), count, seed=1)
        assert np.bincount(taken["label"][:], minlength=4).tolist() == expected

    def test_shares_are_right_to_within_one_example(self):
        split = split_of(self.LABELS)
        for count in range(20, 200, 7):
            found = np.bincount(take_examples(split, count, seed=1)["label"][:], minlength=4)
            assert np.abs(found - count * np.array([0.7, 0.25, 0, 0.05])).max() < 1

    def test_a_smaller_choice_lies_within_a_larger_one(self):
        split = split_of(self.LABELS).add_column("row", list(range(200)))
        chosen = [set(take_examples(split, count, seed=1)["row"]) for count in range(3, 201)]
        assert all(small < large for small, large in pairwise(chosen))

    def test_seed_decides_and_order_is_kept(self):
        split = split_of(self.LABELS).add_column("row", list(range(200)))
        first, again, other = (list(take_examples(split, 50, seed=seed)["row"]) for seed in (0, 0, 1))
        assert first == again == sorted(first)
        assert first != other

    @pytest.mark.parametrize("count", [2, 201])
    def test_count_must_leave_one_of_each_class_and_be_there(self, count):
        with pytest.raises(ValueError, match=f"{count} labelled examples .* between 3, one per class, and 200"):
            take_examples(split_of(self.LABELS), count, seed=0)


class TestSeveralLabels:
    LABELS = [[0]] * 12 + [[0, 1]] * 6 + [[0, 1, 3]] * 2 + [[]] * 4

    def test_strata_are_the_rarest_class_of_each_image(self):
        # Class 0 occurs 20 times, 1 occurs 8 times, 3 occurs twice.
        assert strata_of(split_of(self.LABELS, several=True)).tolist() == [0] * 12 + [1] * 6 + [3] * 2 + [-1] * 4

    def test_carved_split_has_rare_classes_too(self, caplog):
        with caplog.at_level(logging.WARNING):
            carved = carve_split("x", {"train": split_of(self.LABELS, several=True)}, "validation", 0.25, seed=0)
        assert sorted(carved["validation"]["label"]) == sorted([[0]] * 3 + [[0, 1]] * 2 + [[0, 1, 3]] + [[]])
        assert len(carved["train"]) == 24 - 7
        assert caplog.text == ""

    def test_taken_examples_have_every_stratum(self):
        taken = take_examples(split_of(self.LABELS, several=True), 4, seed=0)
        assert sorted(taken["label"]) == [[], [0], [0, 1], [0, 1, 3]]


def test_strata_of_one_label_are_the_labels():
    assert strata_of(split_of([0, 3, 1])).tolist() == [0, 3, 1]
