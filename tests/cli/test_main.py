"""The console script: what it lists, what it refuses, and that it starts a command."""

import shlex
import subprocess
import sys

import pytest

from bissl_hf.cli import main as program
from bissl_hf.cli import predict


def test_every_command_is_listed_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"]):
        program.main(arguments)
        lines = capsys.readouterr().out.splitlines()
        for name, text in program.COMMANDS.items():
            assert [line.split() for line in lines].count([name, *text.split()]) == 1


def test_the_list_of_commands_waits_for_no_large_import() -> None:
    code = "import sys; from bissl_hf.cli.main import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: bissl-hf COMMAND")
    assert done.stdout.endswith("\nFalse\n")


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for name, message in (("aling", "'aling'; did you mean align?"), ("zzz", "'zzz'; see bissl-hf --help.")):
        with pytest.raises(SystemExit):
            program.main([name])
        assert f"error: Unknown command {message}" in capsys.readouterr().err


def test_a_command_gets_the_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bissl-hf"])
    monkeypatch.setattr(predict, "main", lambda arguments: sys.argv.append(arguments))
    program.main(["predict", "--model", "x"])
    assert sys.argv == ["bissl-hf predict", ["--model", "x"]]


def test_a_reader_of_the_help_may_stop_early() -> None:
    code = "from bissl_hf.cli.refusal import show; show('line\\n' * 100_000)"
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} | head -1; exit ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "line\n", "")
