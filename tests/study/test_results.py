"""The committed results are what the committed raw data give, and the README tells them."""

import json
import shutil
from pathlib import Path

import pytest

from bissl_hf.study.statistics import compare
from recipes import study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", sorted(folder.name for folder in RESULTS.iterdir()))
def test_the_tables_follow_from_the_raw_results(name: str, tmp_path: Path) -> None:
    shutil.copy(RESULTS / name / "results.json", tmp_path)
    study.main(["--report_only", "true", "--output_dir", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (RESULTS / name / "table.md").read_text()
    figures = {file.name for file in (RESULTS / name / "figures").iterdir()}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == figures


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_main_table_holds_the_measured_numbers(page: str) -> None:
    results = json.loads((RESULTS / "fashion" / "results.json").read_text())
    rows = {
        (row["train_examples"], row["arm"]): row["measures"]["score"]
        for row in compare(results["runs"], "conventional")
    }
    text = (ROOT / page).read_text()
    for labels, label in ((100, "100"), (500, "500"), (2000, "2,000")):
        comparison = rows[labels, "bissl"]["comparison"]
        low, high = (100 * bound for bound in comparison["interval"])
        others = ("joint", "identity", "conventional-longer")
        cells = [
            label,
            f"{100 * rows[labels, 'conventional']['mean']:.1f}",
            f"{100 * rows[labels, 'bissl']['mean']:.1f}",
            f"{100 * comparison['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{comparison['holm_p_value']:.2f}",
            *(f"{100 * rows[labels, arm]['mean']:.1f}" for arm in others),
        ]
        assert f"| {' | '.join(cells)} |" in text
