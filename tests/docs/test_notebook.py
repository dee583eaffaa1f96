"""The cells of docs/tutorial.ipynb run in their order, with small numbers of steps."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from .pages import ROOT
from .test_examples import shrink

NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def cells() -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


def test_the_notebook_has_no_results_of_a_machine() -> None:
    for cell in cells():
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    space: dict[str, Any] = {"__name__": "__main__"}
    with mpl.rc_context({"backend": "agg"}):
        for cell in cells():
            if cell["cell_type"] == "code":
                exec(compile(shrink("".join(cell["source"])), cell["id"], "exec"), space)
    assert len(space["predictions"]) == 3
    assert 0 <= space["test_metrics"]["test_accuracy"] <= 1
    assert len(space["scores"]) == 1
