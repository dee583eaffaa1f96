"""Signals in each phase of a run: it finishes its step, saves and ends, and the run that goes on is the same."""

import signal

import pytest

from bissl_hf.checkpoints import find_last_checkpoint

from .harness import Fault, is_same_end, run

TRAINER = "bissl_hf.trainer.bissl_trainer:BiSSLTrainer"
PHASES = {
    "lower step": (TRAINER, "_lower_step", 2),
    "upper step": (TRAINER, "_upper_step", 2),
    "solve": ("bissl_hf.bilevel.upper_phase:UpperPhase", "solve", 1),
    "evaluation": (TRAINER, "prediction_step", 1),
    "save": ("bissl_hf.trainer.resumable_trainer", "write_manifest", 3),
    "last step": (TRAINER, "_upper_step", 4),
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def check(folder, whole, phase: str, number: int) -> None:
    code = run("bissl", folder, Fault(*PHASES[phase], number))
    assert code in (128 + number, -number), "ended politely; or at once, where no further step is to come"
    newest, passed_over = find_last_checkpoint(folder)
    assert newest is not None
    assert passed_over == {}
    assert run("bissl", folder) == 0
    assert is_same_end(folder, whole["bissl"])


@pytest.mark.slow
def test_a_signal_in_an_upper_step(tmp_path, whole):
    check(tmp_path, whole, "upper step", signal.SIGTERM)


@pytest.mark.soak
@pytest.mark.parametrize("number", SIGNALS, ids=[number.name for number in SIGNALS])
@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_each_phase(tmp_path, whole, phase, number):
    check(tmp_path, whole, phase, number)
