"""Signals to a run in a process of its own: it finishes its step, saves, says how to go on, and is the same run after
a resume."""

import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState

from bissl_hf.checkpoints import read_mapping, write_json
from bissl_hf.distributed import rank
from bissl_hf.run_lock import release_folder
from bissl_hf.trainer.signals import STOP_SIGNALS, StopSignals, ending_at_signals

from ..processes import run_in_processes, start_forked
from .test_pretext_trainer import make_trainer

SETTINGS = {"max_steps": 9, "save_strategy": "no"}


class Slowly(TrainerCallback):
    """Notes each step and takes its time for it."""

    def on_step_begin(self, args, state, control, **kwargs):
        Path(args.output_dir, "step").write_text(str(state.global_step))
        time.sleep(0.3)


def train_slowly(folder: str, workers: int) -> None:
    trainer = make_trainer(
        folder, dataloader_num_workers=workers, dataloader_prefetch_factor=2 if workers else None, **SETTINGS
    )
    trainer.add_callback(Slowly())
    trainer.train()
    Path(folder, "finished").touch()


def start(folder: Path, workers: int) -> BaseProcess:
    """Starts a run, and waits for its second step."""
    run = start_forked(train_slowly, str(folder), workers, errors=errors_of(folder))
    deadline = time.monotonic() + 120
    while not (folder / "step").is_file() or (folder / "step").read_text() in ("", "0"):
        assert run.is_alive(), errors_of(folder).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return run


def errors_of(folder: Path) -> Path:
    return folder.with_name("errors")


def members_of(group: int) -> list[str]:
    """Processes of a group that are alive."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(status.parent.name)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers", "to_group"),
    [
        (signal.SIGTERM, 0, False),
        (signal.SIGTERM, 2, True),
        (signal.SIGINT, 2, True),
        (signal.SIGHUP, 0, False),
        (signal.SIGUSR1, 0, False),
    ],
)
def test_a_signal_saves_and_ends_the_run(tmp_path, number, workers, to_group):
    run = start(tmp_path / "run", workers)
    if to_group:
        os.killpg(run.pid, number)
    else:
        os.kill(run.pid, number)
    run.join(60)
    errors = errors_of(tmp_path / "run").read_text()
    assert run.exitcode == 128 + number, errors
    assert f"Interrupted by {number.name} after step" in errors
    assert "Go on with --resume_from_checkpoint true" in errors
    assert not (tmp_path / "run" / "finished").exists()
    deadline = time.monotonic() + 15
    while members_of(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert members_of(run.pid) == [], "a worker is left"
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    resumed = make_trainer(tmp_path / "run", **SETTINGS)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole = make_trainer(tmp_path / "whole", **SETTINGS)
    whole.train()
    pairs = zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    losses = [[row["loss"] for row in trainer.state.log_history if "loss" in row] for trainer in (resumed, whole)]
    assert losses[0] == losses[1], "an interrupted epoch is logged once, whole"
    assert load_file(checkpoint / "model.safetensors")


@pytest.mark.slow
def test_a_killed_run_takes_its_workers_with_it(tmp_path):
    run = start(tmp_path / "run", 2)
    run.kill()
    run.join(60)
    deadline = time.monotonic() + 2  # torch's workers look for their parent every five seconds
    while members_of(run.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members_of(run.pid) == []


@pytest.mark.slow
def test_a_second_signal_ends_the_run_at_once(tmp_path):
    run = start(tmp_path / "run", 0)
    os.kill(run.pid, signal.SIGTERM)
    os.kill(run.pid, signal.SIGINT)
    run.join(60)
    assert run.exitcode in (-signal.SIGTERM, -signal.SIGINT)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_handlers_are_those_of_before_after_training(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    make_trainer(tmp_path, max_steps=1).train()
    assert signal.getsignal(signal.SIGTERM) is before


class _Interrupting:
    """A transform that sends this process a signal at its second call."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, inputs, key):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_outside_of_training_is_one_sentence(number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, ending_at_signals():
        signal.raise_signal(number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == (
        f"Interrupted by {signal.Signals(number).name}. Go on with --resume_from_checkpoint true.\n"
    )
    assert signal.getsignal(number) is before


def test_a_signal_after_a_training_that_failed_is_left_to_others(tmp_path):
    """The handlers of a training that ended by an error pass on what comes later."""

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyError

    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.add_callback(Fails())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test process of several ignores it
    try:
        with pytest.raises(KeyError):
            trainer.train()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
        release_folder(tmp_path)


def test_a_signal_in_a_step_lets_the_step_end(tmp_path, capsys):
    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="no", transform=_Interrupting())
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 128 + signal.SIGTERM
    assert "Interrupted by SIGTERM after step 2 of 5" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]


def signal_in_the_first_step(folder: Path) -> None:
    stop, control, state = StopSignals(), TrainerControl(), TrainerState()
    stop.on_train_begin(None, state, control)
    stop._received = signal.SIGHUP if rank() == 1 else 0
    steps = 0
    while steps < 3 and not control.should_training_stop:
        stop.on_step_end(None, state, control)
        steps += 1
    stop.on_train_end(None, state, control)
    write_json(folder / f"{rank()}.json", {"steps": steps, "by": stop.stopped_by})


def steps_on_two(folder: Path) -> None:
    """Eight steps, each slow on one of two processes in turn; the second has received a signal in the sixth."""
    stop, control, state = StopSignals(), TrainerControl(), TrainerState()
    stop.on_train_begin(None, state, control)
    dist.barrier()
    begun = time.monotonic()
    for step in range(8):
        time.sleep(0.2 if step % 2 == rank() else 0.0)
        if step == 5 and rank() == 1:
            stop._received = signal.SIGHUP
        stop.on_step_end(None, state, control)
        if control.should_training_stop:
            break
    seconds = time.monotonic() - begun
    stop.on_train_end(None, state, control)
    write_json(folder / f"{rank()}.json", {"step": step, "by": stop.stopped_by, "seconds": seconds})


def signal_after_the_last_step(folder: Path) -> None:
    stop, control, state = StopSignals(), TrainerControl(), TrainerState()
    ended: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: ended.append(number))
    stop.on_train_begin(None, state, control)
    stop.on_step_end(None, state, control)
    stop._received = signal.SIGUSR1 if rank() == 0 else 0
    stop.on_train_end(None, state, control)
    write_json(folder / f"{rank()}.json", {"ended": [int(number) for number in ended]})


@pytest.mark.distributed
def test_processes_stop_at_the_same_step_and_wait_for_no_step(tmp_path):
    run_in_processes(steps_on_two, 2, tmp_path)
    first, second = (read_mapping(tmp_path / f"{number}.json") for number in (0, 1))
    assert first["step"] == second["step"] == 6, "one step after the signal"
    assert first["by"] == second["by"] == signal.SIGHUP
    # Seven steps, of which each is slow on one process: 1.4 s if each waited for the other's.
    assert max(first["seconds"], second["seconds"]) < 1.2


@pytest.mark.distributed
def test_a_signal_in_the_first_step_ends_no_process_alone(tmp_path):
    run_in_processes(signal_in_the_first_step, 2, tmp_path)
    found = [read_mapping(tmp_path / f"{number}.json") for number in (0, 1)]
    assert found == [{"steps": 2, "by": signal.SIGHUP}] * 2


@pytest.mark.distributed
def test_a_signal_after_the_last_step_ends_all_processes(tmp_path):
    run_in_processes(signal_after_the_last_step, 2, tmp_path)
    assert [read_mapping(tmp_path / f"{number}.json")["ended"] for number in (0, 1)] == [[signal.SIGUSR1]] * 2
