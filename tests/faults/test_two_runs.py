"""Two runs in one folder: the second is refused while the first is alive, and takes over once it has ended."""

import time

import pytest

from bissl_hf.run_lock import LOCK_NAME

from .harness import TRAINERS, is_same_end, run, start


@pytest.mark.slow
def test_a_second_run_is_refused_and_a_later_one_goes_on(tmp_path, whole):
    first = start("bissl", tmp_path)
    while not (tmp_path / LOCK_NAME).exists():
        time.sleep(0.02)
    with pytest.raises(ValueError, match=f"in use by process {first.pid} on "):
        TRAINERS["bissl"](str(tmp_path)).train()
    first.kill()
    first.join()
    assert run("bissl", tmp_path) == 0
    assert is_same_end(tmp_path, whole["bissl"])
