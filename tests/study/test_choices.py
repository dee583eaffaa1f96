"""Settings that arms choose among: by what, and how a study finds them again."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bissl_hf.study.choices import choose, describe_choice
from bissl_hf.study.report import build_results, write_report
from bissl_hf.study.running import Study
from bissl_hf.trainer.finetune_trainer import FineTuneTrainer

from ..recipes import runs as tiny
from .test_running import study_of, trained, without_times  # noqa: F401

ARMS = [
    {"name": "plain", "kind": "conventional"},
    {"name": "longer", "kind": "conventional", "search": [{"max_steps": 2}, {"max_steps": 4}]},
    {"name": "ours", "kind": "bissl", "search": {"upper_steps": [1, 2]}},
    {"name": "both", "kind": "joint", "match": "rows", "search": {"downstream_weight": [1.0, 3.0]}},
    {"name": "both-longer", "kind": "joint", "match": "wall_clock"},
]


def test_the_best_mean_on_the_validation_split_is_chosen() -> None:
    tries = [[figures(0.9, 1.0), figures(0.1, 1.0)], [figures(0.6, 9.0), figures(0.5, 9.0)]]
    assert choose(tries, "accuracy") == 1
    found = describe_choice([{"weight": 1}, {"weight": 3}], tries, "accuracy")
    assert found["chosen"] == 1
    assert found["tries"][0] == {"setting": {"weight": 1}, "scores": [0.9, 0.1]}


def test_equal_scores_are_told_apart_by_the_loss_and_then_by_their_order() -> None:
    assert choose([[figures(0.5, 2.0)], [figures(0.5, 1.0)]], "accuracy") == 1
    assert choose([[figures(0.5, 1.0)], [figures(0.5, 1.0)]], "accuracy") == 0


@pytest.mark.parametrize("tries", [[], [[]], [[{}], [{}, {}]]])
def test_settings_without_the_same_runs_are_refused(tries: Any) -> None:
    with pytest.raises(ValueError, match=r"Settings with \[.*\] runs are compared; each needs the same number"):
        choose(tries, "accuracy")


def figures(accuracy: float, loss: float) -> dict[str, float]:
    return {"eval_accuracy": accuracy, "eval_loss": loss}


def study(images: Path, output: Path, **changes: Any) -> Study:
    options: dict[str, Any] = {"arms": ARMS, "seeds": 1, "choice_seeds": 1, "rival": "both", "own_statistics": False}
    return study_of(images, output, **{**options, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[dict[str, Any]], list[int]]:
    """Images, the folder of the study, its results and the sizes of what was evaluated."""
    root = tmp_path_factory.mktemp("choices")
    images = tiny.write_splits(root / "images")
    sizes: list[int] = []
    evaluate = FineTuneTrainer.evaluate

    def counted(trainer: FineTuneTrainer, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        if "-try" in str(trainer.args.output_dir):
            sizes.append(len(eval_dataset or trainer.eval_dataset))
        return evaluate(trainer, eval_dataset, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuneTrainer, "evaluate", counted)
        runs = study(images, root / "out").run()
    return images, root / "out", runs, sizes


def results_of(folder: Path, pattern: str) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob(f"parts/*/{pattern}/result.json"))]


@pytest.mark.slow
def test_runs_have_the_setting_that_was_chosen(finished: tuple[Path, Path, list[dict[str, Any]], list[int]]) -> None:
    images, output, runs, sizes = finished
    assert [run["arm"] for run in runs] == [arm["name"] for arm in ARMS]
    choices = {choice["arm"]: choice for choice in study(images, output).choices()}
    assert set(choices) == {"longer", "ours", "both"}
    for name, choice in choices.items():
        tried = [result["eval_accuracy"] for result in results_of(output, f"{name}-try*-seed1000")]
        assert [each["scores"] for each in choice["tries"]] == [[score] for score in tried]
    chosen = {name: choice["tries"][choice["chosen"]]["setting"] for name, choice in choices.items()}
    by_arm = {run["arm"]: run for run in runs}
    assert by_arm["longer"]["pretext_steps"] == 3 + chosen["longer"]["max_steps"]
    assert by_arm["ours"]["labelled_rows"] == 2 * chosen["ours"]["upper_steps"] * 6 + 12, "and those of the warm-up"
    assert by_arm["both"]["labelled_rows"] == 2 * chosen["ours"]["upper_steps"] * 6
    assert by_arm["ours"]["pretext_images"] == 2 * (1 * 12 + 12), "and those of the curvature"
    assert by_arm["both"]["pretext_images"] == 2 * 12
    (settings,) = output.glob("parts/*/both-seed0/backbone/settings.json")
    assert json.loads(settings.read_text())["overrides"] == chosen["both"]
    assert set(sizes) == {6}, "tries see the validation split alone"


@pytest.mark.slow
def test_a_search_is_found_again(
    finished: tuple[Path, Path, list[dict[str, Any]], list[int]],
    tmp_path: Path,
    trained: list[str],  # noqa: F811
) -> None:
    images, output, runs, _ = finished
    shutil.copytree(output, tmp_path / "out")
    assert study(images, tmp_path / "out").run() == runs
    assert trained == []
    (lost,) = (tmp_path / "out").glob("parts/*/both-try2-seed1000")
    (lost / "result.json").unlink()
    with pytest.raises(RuntimeError, match="both-try2-seed1000 is not finished, and the choice for both needs it"):
        study(images, tmp_path / "out").choices()
    assert without_times(study(images, tmp_path / "out").run()) == without_times(runs)
    assert trained == [], "the search of fine-tuning was finished"


@pytest.mark.slow
def test_the_search_of_fine_tuning_can_be_made_once(
    finished: tuple[Path, Path, list[dict[str, Any]], list[int]],
    tmp_path: Path,
    trained: list[str],  # noqa: F811
) -> None:
    images, _, _, _ = finished
    arms = [
        ARMS[0],
        {**ARMS[3], "match": "steps"},
        ARMS[4],
        {"name": "ours", "kind": "bissl", "search": ARMS[2]["search"]},
    ]
    options = {"arms": arms, "seeds": 2, "choice_seeds": 2, "search_trials": 2, "search_once": True}
    made = study(images, tmp_path, **options)
    runs = made.run()
    pairs = {arm["name"]: {(run["learning_rate"], run["weight_decay"]) for run in runs if run["arm"] == arm["name"]}
             for arm in arms}  # fmt: skip
    assert all(len(found) == 1 for found in pairs.values()), "the same for all seeds"
    assert pairs["both-longer"] == pairs["both"]
    (pair,) = pairs["plain"]
    tried = [(run["learning_rate"], run["weight_decay"]) for run in results_of(tmp_path, "plain-seed100?")]
    assert pair in tried
    searched = {folder.split("/")[1] for folder in trained if folder.endswith("/search") or "/search/" in folder}
    assert all(name.endswith(("seed1000", "seed1001")) for name in searched)
    assert "once for each arm" in write_report(build_results(made.plan, runs, made.choices()), tmp_path).replace(
        "\n", " "
    )


@pytest.mark.slow
def test_other_settings_to_try_are_refused(finished: tuple[Path, Path, list[dict[str, Any]], list[int]]) -> None:
    images, output, _, _ = finished
    changed = [*ARMS[:2], {**ARMS[2], "search": {"upper_steps": [1, 3]}}, *ARMS[3:]]
    with pytest.raises(ValueError, match="was begun with other settings"):
        study(images, output, arms=changed)


@pytest.mark.slow
def test_the_report_tells_what_was_tried_and_chosen(
    finished: tuple[Path, Path, list[dict[str, Any]], list[int]], tmp_path: Path
) -> None:
    images, output, _, _ = finished
    made = study(images, output)
    runs = [
        {"dataset": str(images), "train_examples": 12, "arm": arm["name"], "seed": seed, "metric": "accuracy",
         "score": 0.5 + 0.1 * seed * number, "features": {"knn": 0.5}, "labelled_rows": 1234}
        for number, arm in enumerate(ARMS)
        for seed in range(10)
    ]  # fmt: skip
    choice = made.choices()
    shown = write_report(build_results(made.plan, runs, choice), tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "## Differences to both" in text
    assert "| ours | upper_steps 1 |" in text
    assert text.count("| yes |") == 3
    both = "both: 3 common pretext steps, then 2 steps on both losses at once, as many as BiSSL's lower steps"
    assert f"{both}, reading as many labelled images as the upper steps of ours, downstream_weight by its" in text
    longer = "as many more on both losses at once as fit into the CPU seconds that ours took"
    assert f"{longer}, with the settings of both." in text
    assert json.loads((tmp_path / "results.json").read_text())["choices"] == choice
    assert max(map(len, shown.splitlines())) <= 100
