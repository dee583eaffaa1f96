"""The tables of README.md and docs/results.md against the raw results beside them."""

import json
import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parents[2]
ARMS = {
    "pre-training and fine-tuning": "conventional", "BiSSL, identity (first order)": "bissl",
    "BiSSL, Gauss-Newton": "gauss-newton", "joint training of both losses": "joint",
    "joint training, as long as BiSSL takes": "joint-longer",
}  # fmt: skip


def scores() -> dict[str, list[float]]:
    """Test accuracies in percent by arm, in the order of the seeds."""
    results = json.loads((ROOT / "docs/results/settings_fashion/results.json").read_text())
    found: dict[str, list[float]] = {}
    for run in sorted(results["runs"], key=lambda run: run["seed"]):
        found.setdefault(run["arm"], []).append(100 * run["score"])
    return found


@pytest.mark.parametrize(
    ("page", "title", "column"), [("README.md", "fine-tuned", 1), ("docs/results.md", "fine-tuned", 2)]
)
def test_the_table_of_tuned_methods_is_that_of_the_raw_results(page, title, column):
    text = (ROOT / page).read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    header = next(number for number, row in enumerate(rows) if len(row) > column and row[column] == title)
    measured, seen = scores(), 0
    for row in rows[header + 2 :]:
        arm = ARMS.get(row[0], row[0])
        if arm not in measured:
            break
        seen += 1
        assert row[column] == f"{mean(measured[arm]):.1f}", arm
        if difference := re.match(r"\+\d+\.\d", row[column + 1]):
            gains = [one - other for one, other in zip(measured[arm], measured["conventional"], strict=True)]
            assert difference.group() == f"{mean(gains):+.1f}", arm
    assert seen == (len(ARMS) if page == "README.md" else len(measured))
