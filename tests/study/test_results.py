"""The committed results are what the committed raw data give, and the page on results says them."""

import json
import shutil
from pathlib import Path

import pytest

from bissl_hf.cli import study
from bissl_hf.study.statistics import compare

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("name", sorted(folder.name for folder in RESULTS.iterdir()))
def test_the_tables_follow_from_the_raw_results(name: str, tmp_path: Path) -> None:
    shutil.copy(RESULTS / name / "results.json", tmp_path)
    study.main(["--report_only", "true", "--output_dir", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (RESULTS / name / "table.md").read_text()
    figures = {file.name for file in (RESULTS / name / "figures").iterdir()}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == figures


FASHION = {("fashion-mnist", 100): "100", ("fashion-mnist", 500): "500", ("fashion-mnist", 2000): "2,000"}
TRANSFER = {
    ("mnist_5000", 100): "MNIST, 100",
    ("mnist_5000", 500): "MNIST, 500",
    ("digits", 100): "digits, 100",
    ("digits", 500): "digits, 500",
}


@pytest.mark.parametrize(
    ("page", "study", "labels"),
    [
        ("docs/results.md", "fashion", FASHION),
        ("docs/results.md", "transfer", TRANSFER),
        ("docs/results.md", "transfer_2000", {("mnist_5000", 2000): "MNIST, 2,000"}),
    ],
)
def test_the_tables_of_pages_hold_the_measured_numbers(
    page: str, study: str, labels: dict[tuple[str, int], str]
) -> None:
    results = json.loads((RESULTS / study / "results.json").read_text())
    rows = {
        (Path(row["dataset"]).name, row["train_examples"], row["arm"]): row["measures"]["score"]
        for row in compare(results["runs"], "conventional")
    }
    text = (ROOT / page).read_text()
    for place, label in labels.items():
        means = {
            arm: f"{100 * measure['mean']:.1f}" for (*found, arm), measure in rows.items() if tuple(found) == place
        }
        comparison = rows[*place, "bissl"]["comparison"]
        low, high = (100 * bound for bound in comparison["interval"])
        cells = [
            label,
            means["conventional"],
            means["bissl"],
            f"{100 * comparison['difference']:+.1f} ({low:+.1f} to {high:+.1f})",
            f"{comparison['holm_p_value']:.2f}",
            *(means[arm] for arm in ("joint", "identity", "conventional-longer")),
        ]
        assert f"| {' | '.join(cells)} |" in text


def test_the_table_on_the_second_order_holds_the_measured_numbers() -> None:
    results = json.loads((RESULTS / "curvature" / "results.json").read_text())
    text = (ROOT / "docs" / "results.md").read_text()
    for row in compare(results["runs"], "conventional"):
        measures = {name: measure["mean"] for name, measure in row["measures"].items()}
        shown = [100 * measures[name] for name in ("score", "features/knn", "features/probe")]
        assert f" | {' | '.join(f'{value:.1f}' for value in shown)} | " in text
        if "solver_cosine" in measures:
            assert f" | {measures['solver_cosine']:.2f} | " in text
