"""The test score over the steps of fine-tuning."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from bissl_hf.study.curves import mean_curve, settled_at
from bissl_hf.study.report import build_results, write_report

from ..recipes import runs as tiny
from .test_running import study_of


def test_recording_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    images = tiny.write_splits(tmp_path / "images")
    options = {"arms": [{"name": "plain", "kind": "conventional"}], "seeds": 1, "search_trials": 0}
    plain = study_of(images, tmp_path / "plain", own_statistics=False, **options)
    recorded = study_of(images, tmp_path / "recorded", own_statistics=False, curve_every=3, **options)
    (without,), (found,) = plain.run(), recorded.run()
    assert "curve" not in without
    steps, scores = zip(*found["curve"], strict=True)
    assert steps == (0, 3, 4), "before the first step, every third, after the last"
    assert scores[-1] == found["score"] == without["score"]
    weights = [
        load_file(next((tmp_path / name).rglob("finetuning/model/model.safetensors")))
        for name in ("plain", "recorded")
    ]
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    write_report(build_results(recorded.plan, [found]), tmp_path)
    assert (tmp_path / "figures" / "curves.png").stat().st_size > 5000


def test_curves_are_averaged_over_seeds() -> None:
    steps, scores = mean_curve([{"curve": [(0, 0.2), (5, 0.6)]}, {"curve": [(0, 0.4), (5, 0.8)]}])
    assert steps == [0, 5]
    assert scores == pytest.approx([0.3, 0.7])
    with pytest.raises(ValueError, match="have different steps; run them with the same curve_every"):
        mean_curve([{"curve": [(0, 0.2)]}, {"curve": [(0, 0.4), (5, 0.8)]}])


@pytest.mark.parametrize(
    ("scores", "step"), [([0.1, 0.5, 0.699, 0.7], 20), ([0.7, 0.7, 0.7, 0.7], 0), ([0.7, 0.7, 0.1, 0.7], 30)]
)
def test_a_curve_has_settled_once_it_stays_near_its_end(scores: list[float], step: int) -> None:
    assert settled_at([0, 10, 20, 30], scores) == step
