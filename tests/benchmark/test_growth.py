"""Nothing that a step does grows with the data set."""

import time

import numpy as np
import torch

from bissl_hf.benchmark.growth import growth_rows, images_on_disk, measure_growth
from bissl_hf.data.alternation import KeyedSource, StepKey, Stream, _permutation
from bissl_hf.data.decoded import DecodedImages

from .test_benchmark import TINY


def test_reading_from_a_million_rows_does_no_work_per_row(tmp_path):
    """The permutation of an epoch is drawn once; 300 batches after it take less time than three more would."""
    rows = 1_000_000
    np.lib.format.open_memmap(tmp_path / "rows.npy", mode="w+", dtype=np.uint8, shape=(rows, 3, 4, 4)).flush()
    images = DecodedImages(tmp_path / "rows.npy")
    source = KeyedSource(images, 64, len, steps_per_alternation=20)
    _permutation.cache_clear()
    start = time.process_time()
    source.read(StepKey(0, int(Stream.LOWER), 0, 0, 0))
    drawing = time.process_time() - start
    start = time.process_time()
    for step in range(300):
        source.read(StepKey(0, int(Stream.LOWER), step // 20, step % 20, 0))
    assert _permutation.cache_info().misses == 1
    assert time.process_time() - start < max(50 * drawing, 1.0)
    assert len(source.describe()) < 100


def test_images_on_disk_are_read_by_row(tmp_path):
    images = images_on_disk(tmp_path / "images.npy", 30, 6)
    assert images[7]["labels"] == 7
    assert images[7]["pixel_values"].shape == (3, 6, 6)
    assert not torch.equal(images[7]["pixel_values"], images[8]["pixel_values"])


def test_each_size_is_measured_against_its_first_value():
    axes = {"lower_batch": (6, 12), "rows": (100, 1000)}
    growth = measure_growth(torch.device("cpu"), base=TINY.changed(repeats=1), axes=axes, say=lambda text: None)
    assert {axis: [point["value"] for point in points] for axis, points in growth.items()} == {
        "lower_batch": [6, 12], "rows": [100, 1000],
    }  # fmt: skip
    for first, second in growth.values():
        assert first["ratio"] == 1
        assert second["ratio"] == second["seconds"] / first["seconds"]
    table = growth_rows(growth)
    assert table[3]["value"] == "1,000"
    assert len(table) == 4
