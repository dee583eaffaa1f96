"""A whole study with an arm that gets the seconds of another: how many pretext steps it takes, what is reported."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bissl_hf.study.report import build_results, write_report
from bissl_hf.study.running import Study
from bissl_hf.trainer.joint_trainer import JointTrainer
from bissl_hf.trainer.single_level_trainer import SingleLevelTrainer

from ..recipes import runs as tiny
from .test_running import study_of

COMMON_STEPS, COMMON_BATCH, LOWER_BATCH = 8, 6, 12
QUIET = {"disable_tqdm": True, "logging_strategy": "no"}
PRETRAIN = {"per_device_train_batch_size": COMMON_BATCH, "learning_rate": 0.1, **QUIET}
BISSL = {
    "num_alternations": 3, "lower_steps": 1, "upper_steps": 4, "solver_max_iterations": 3, "proximal_weight": 10.0,
    "per_device_lower_batch_size": LOWER_BATCH, "per_device_train_batch_size": 6, "head_warmup_epochs": 1, **QUIET,
}  # fmt: skip
ARMS = [
    {"name": "plain", "kind": "conventional"},
    {"name": "ours", "kind": "bissl"},
    {"name": "clock", "kind": "conventional", "match": "wall_clock"},
    {"name": "both", "kind": "joint"},
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, list[dict[str, Any]], Counter[str]]]:
    """The study, its results, and how many steps were taken in each folder below `parts`."""
    root = tmp_path_factory.mktemp("matching")
    images = tiny.write_splits(root / "images")
    taken: Counter[str] = Counter()

    def counting(kind: type[SingleLevelTrainer]) -> Any:
        step = kind.training_step

        def counted(trainer: SingleLevelTrainer, *args: Any, **kwargs: Any) -> Any:
            taken[str(trainer.args.output_dir).split("/parts/")[1]] += 1
            return step(trainer, *args, **kwargs)

        return counted

    changes = {"pretrain": PRETRAIN, "pretrain_steps": COMMON_STEPS, "bissl": BISSL, "arms": ARMS, "search_trials": 0}
    study = study_of(images, root / "out", seeds=2, **changes)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (SingleLevelTrainer, JointTrainer):
            patch.setattr(kind, "training_step", counting(kind))
        yield study, study.run(), taken


def read(study: Study, name: str) -> dict[str, Any]:
    (file,) = study.folder.glob(f"{name}/result.json")
    return json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_third_arm_takes_the_steps_that_fit_into_the_seconds_of_bissl(
    finished: tuple[Study, list[dict[str, Any]], Counter[str]], seed: int
) -> None:
    """A step costs what it did in the arm matched by steps, with the same batch and the same seed."""
    study, runs, taken = finished
    paced = read(study, f"plain-seed{seed}")
    ours, clock = (read(study, f"*/{arm}-seed{seed}/backbone") for arm in ("ours", "clock"))
    fitting = ours["processor_seconds"] / (paced["processor_seconds"] / paced["steps"])
    assert fitting > 2, "a bound of one step would be met in any case"
    assert clock["steps"] <= fitting < clock["steps"] + 1
    (folder,) = [name for name in taken if name.endswith(f"clock-seed{seed}/backbone")]
    assert taken[folder] == clock["steps"]
    assert taken[f"pretrain-seed{seed}"] == COMMON_STEPS
    by_arm = {run["arm"]: run for run in runs if run["seed"] == seed}
    assert by_arm["clock"]["pretext_steps"] == COMMON_STEPS + clock["steps"]
    for arm in ("plain", "ours", "both"):
        assert by_arm[arm]["pretext_steps"] == COMMON_STEPS + 3
    assert [steps for name, steps in taken.items() if name.endswith(f"both-seed{seed}/backbone")] == [3]
    assert by_arm["ours"]["backbone_seconds"] == ours["seconds"]


@pytest.mark.slow
def test_the_report_says_what_each_arm_is_matched_to(
    finished: tuple[Study, list[dict[str, Any]], Counter[str]], tmp_path: Path
) -> None:
    study, runs, _ = finished
    results = build_results(study.plan, runs)
    shown = " ".join(write_report(results, tmp_path).split())
    sentences = {
        "plain": f"{COMMON_STEPS} common pretext steps, then 3 more, as many as BiSSL takes",
        "both": f"{COMMON_STEPS} common pretext steps, then 3 steps on both losses at once, as many as BiSSL's lower",
        "clock": f"{COMMON_STEPS} common pretext steps, then as many more as fit into the CPU seconds that ours took",
    }
    for arm, sentence in sentences.items():
        assert f"{arm}: {sentence}" in shown
        assert f"{arm}: {sentence}" in (tmp_path / "table.md").read_text()
    assert results["baseline"] == "plain"
