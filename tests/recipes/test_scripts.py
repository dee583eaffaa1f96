"""Each recipe, run as a script, is the command of its name."""

import runpy
import sys
from importlib import import_module

import pytest

from bissl_hf.cli.main import COMMANDS

from .runs import ROOT

OTHER_NAMES = {"align": "bissl"}
WITHOUT_A_RECIPE = {"demo"}


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - WITHOUT_A_RECIPE))
def test_a_script_is_its_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = ROOT / "recipes" / f"{OTHER_NAMES.get(command, command)}.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(recipe), run_name="__main__")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {recipe.name} ")
    with pytest.raises(SystemExit):
        import_module(f"bissl_hf.cli.{command}").main(["--help"])
    assert capsys.readouterr().out == shown
