import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from bissl_hf.data.workers import LoaderWorkerError, explaining_lost_workers

# Where a worker has ended torch opens ten files, to see whether it may; its own handler may interrupt it there.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in.*FileIO:pytest.PytestUnraisableExceptionWarning")


class Faulty(Dataset):
    """Its worker stops itself, or is killed, at the third row."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 6

    def __getitem__(self, row):
        if row == 2:
            os.kill(os.getpid(), self.number)
        return row


def read(number):
    with explaining_lost_workers():
        for _ in DataLoader(Faulty(number), num_workers=1, timeout=2, prefetch_factor=1):
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (signal.SIGSTOP, r"no loader worker gave a batch within 2 seconds.*raise dataloader_timeout, and go on"),
        (signal.SIGKILL, r"a loader worker has ended.*\(dataloader_num_workers\), and go on from the last checkpoint"),
    ],
)
def test_a_lost_worker_is_one_sentence_and_none_is_left(number, sentence):
    with pytest.raises(LoaderWorkerError, match=sentence):
        read(number)
    deadline = time.monotonic() + 5
    while any(process.daemon for process in multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [process for process in multiprocessing.active_children() if process.daemon]


class Whole(Dataset):
    """Rows that are tensors, whose memory a worker keeps until they are asked for."""

    def __len__(self):
        return 8

    def __getitem__(self, row):
        return torch.zeros(1000)


def read_rest(batches):
    for _ in range(7):
        with explaining_lost_workers(1):
            next(batches)


def test_a_worker_that_is_stopped_with_a_batch_of_its_own_is_noticed():
    batches = iter(DataLoader(Whole(), num_workers=1, timeout=1, prefetch_factor=4))
    next(batches)
    time.sleep(1)
    (worker,) = [process for process in multiprocessing.active_children() if process.daemon]
    os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(LoaderWorkerError, match="no loader worker gave a batch within 1 seconds"):
        read_rest(batches)


def test_other_errors_stay():
    with pytest.raises(RuntimeError, match=r"^out of paper$"), explaining_lost_workers():
        raise RuntimeError("out of paper")
    with pytest.raises(LoaderWorkerError, match="told"), explaining_lost_workers():
        raise LoaderWorkerError("told: DataLoader timed out after 3 seconds")
