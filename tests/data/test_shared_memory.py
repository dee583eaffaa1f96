import shutil
from collections import namedtuple

import numpy as np
import pytest

from bissl_hf.data.decoded import DecodedImages
from bissl_hf.data.shared_memory import check_shared_memory, processes_here

IMAGES = DecodedImages(np.zeros((10, 3, 8, 8), dtype=np.uint8))  # 192 bytes each
Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("options", "need"),
    [
        ({"num_workers": 1}, 192 * 4 * 3),
        ({"num_workers": 2, "prefetch_factor": 3}, 192 * 4 * 7),
        ({"num_workers": 1, "num_processes": 2}, 192 * 4 * 6),
    ],
)
def test_batches_must_fit(monkeypatch, tmp_path, options, need):
    free = [need]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, free[0]))
    batches = [(IMAGES, 4), (IMAGES, 1)]
    check_shared_memory(batches, folder=tmp_path, **options)
    free[0] = need - 1
    message = f"dataloader_num_workers is {options['num_workers']}: batches of 768 bytes need {need:,} bytes of shared"
    with pytest.raises(ValueError, match=message):
        check_shared_memory(batches, folder=tmp_path, **options)
    check_shared_memory(batches, folder=tmp_path, num_workers=0)
    check_shared_memory(batches, folder=tmp_path / "none", **options)


def test_other_rows_are_not_measured(tmp_path):
    check_shared_memory([([1, 2], 10**12), ([], 5)], num_workers=1, folder=tmp_path)


def test_processes_of_the_launcher(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes_here() == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert processes_here() == 4
