"""The table of data sets: complete, consistent, and told to users as it is."""

from pathlib import Path

import pytest

from bissl_hf.data.catalogue import CATALOGUE, CatalogueEntry

DOCUMENT = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text()
# The 14 data sets of the paper, and three more.
# fmt: off
PAPER = [
    "food101", "fashion_mnist", "cifar10", "cifar100", "dtd", "pets", "flowers102", "aircraft", "caltech101", "cars",
    "sun397", "voc2007", "cub200", "stl10",
]
# fmt: on


def test_all_data_sets_of_the_paper_have_a_name() -> None:
    assert sorted(CATALOGUE) == sorted([*PAPER, "imagenet", "imagenette", "mnist"])


@pytest.mark.parametrize(("name", "entry"), CATALOGUE.items())
def test_entries_are_consistent(name: str, entry: CatalogueEntry) -> None:
    assert {"train", "test"} <= set(entry.rows) <= set(entry.splits)
    assert len(set(entry.splits.values())) == len(entry.splits)
    assert entry.class_names is None or len(entry.class_names) == entry.num_classes
    assert entry.data_files is None or "{}" in entry.data_files
    assert entry.multi_label == (name == "voc2007")
    assert entry.license_note
    assert entry.protocol


@pytest.mark.parametrize(("name", "entry"), CATALOGUE.items())
def test_users_are_told_what_the_table_says(name: str, entry: CatalogueEntry) -> None:
    (line,) = [line for line in DOCUMENT.splitlines() if line.startswith(f"| `{name}` |")]
    _, _, repository, revision, images, columns, classes, protocol, terms, _ = (c.strip() for c in line.split("|"))
    assert repository == entry.repository + (f" ({entry.config})" if entry.config else "")
    assert entry.revision.startswith(revision.strip("`"))
    about = "about " if entry.rows_tolerance else ""
    assert images == "; ".join(f"{split} {about}{rows:,}" for split, rows in entry.rows.items())
    assert columns == f"{entry.image_column}, {entry.label_column}"
    assert classes == f"{entry.num_classes:,}" + (", several per image" if entry.multi_label else "")
    assert (protocol, terms) == (entry.protocol, entry.license_note)
    if entry.remark:
        assert f"- `{name}`: {entry.remark}" in DOCUMENT


def test_users_are_told_what_has_never_been_loaded_from_the_hub() -> None:
    loaded = [name for name, entry in CATALOGUE.items() if entry.loaded_from_hub]
    assert loaded == []
    assert "**None of these rows has been loaded from the Hub itself so far.**" in DOCUMENT
