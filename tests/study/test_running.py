"""Studies on tiny images: what runs, what is found again, what is reported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bissl_hf.cli.images import ViewArguments
from bissl_hf.study.arms import Arm
from bissl_hf.study.plan import Plan, StudyArguments
from bissl_hf.study.report import build_results, write_report
from bissl_hf.study.running import Study
from bissl_hf.trainer.bissl_trainer import BiSSLTrainer
from bissl_hf.trainer.resumable_trainer import ResumableTrainer

from ..recipes import runs as tiny

TIMES = ("backbone_seconds", "backbone_processor_seconds", "finetuning_seconds")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_splits(tmp_path_factory.mktemp("images"))


QUIET = {"disable_tqdm": True, "logging_strategy": "no"}
SETTINGS: dict[str, dict[str, Any]] = {
    "pretrain": {"per_device_train_batch_size": 12, "learning_rate": 0.1, **QUIET},
    "bissl": {
        "num_alternations": 2,
        "lower_steps": 1,
        "upper_steps": 1,
        "head_warmup_epochs": 1,
        "per_device_lower_batch_size": 12,
        "per_device_train_batch_size": 6,
        "solver_max_iterations": 2,
        "damping": 300.0,
        "proximal_weight": 10.0,
        **QUIET,
    },
    "finetune": {"num_train_epochs": 2, "per_device_train_batch_size": 6, "eval_strategy": "no", **QUIET},
}


def study_of(images: Path, output: Path, **changes: Any) -> Study:
    settings: dict[str, Any] = {
        "pretext_dataset": str(images),
        "datasets": [str(images)],
        "train_examples": [12],
        "image_size": 8,
        "backbone": {"model_type": "resnet", **tiny.resnet_config().to_diff_dict()},
        "projection_dims": [6, 5],
        "pretrain_steps": 3,
        **SETTINGS,
        "arms": [{"name": "plain", "kind": "conventional"}, {"name": "ours", "kind": "bissl"}],
        "seeds": 2,
        "search_trials": 1,
        "use_cpu": True,
    }
    return Study(Plan(StudyArguments(output_dir=str(output), **{**settings, **changes}), ViewArguments()))


def without_times(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in run.items() if name not in TIMES} for run in runs]


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    output = tmp_path_factory.mktemp("study") / "out"
    return output, study_of(images, output).run()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders, relative to `parts`, of what is trained in a test."""
    folders: list[str] = []
    train = ResumableTrainer.train

    def traced(trainer: ResumableTrainer, *args: Any, **kwargs: Any) -> Any:
        folders.append(str(trainer.args.output_dir).split("/parts/")[1])
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(ResumableTrainer, "train", traced)
    return folders


def test_every_arm_has_a_result_for_every_seed(finished: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = finished
    assert [(run["arm"], run["seed"]) for run in found] == [("plain", 0), ("plain", 1), ("ours", 0), ("ours", 1)]
    for run in found:
        assert run["score"] == run["test_accuracy"]
        assert 0 <= run["score"] <= 1
        assert 0 <= run["score_own_statistics"] <= 1
        for name in ("features", "features_own_statistics"):
            assert 0 <= run[name]["probe"] <= 1
            assert run[name]["scatter_ratio"] > 0
        assert run["pretext_steps"] == 3 + 2
        assert run["backbone_seconds"] > 0
    assert found[0]["learning_rate"] == found[2]["learning_rate"], "the same seed tries the same pairs"
    assert found[0]["test_loss"] != found[2]["test_loss"]
    assert found[0]["features"] != found[0]["features_own_statistics"], "the batch norm makes a difference"
    assert found[2]["pull"] > 0
    assert 0 < found[2]["solver_cosine"] < 1
    assert found[2]["solver_products"] > 0
    assert not {"pull", "solver_cosine", "solver_products"} & set(found[0])


def test_finished_parts_are_never_run_again(
    finished: tuple[Path, list[dict[str, Any]]],
    images: Path,
    trained: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, found = finished
    shutil.copytree(output, tmp_path / "out")
    assert study_of(images, tmp_path / "out").run() == found
    assert trained == []
    assert capsys.readouterr().out.count("is finished") == 8, "2 seeds of: the common steps, further steps, two arms"
    part = next((tmp_path / "out" / "parts").rglob("ours-seed1"))
    for file in ("result.json", "finetuning/result.json"):
        (part / file).unlink()
    again = study_of(images, tmp_path / "out").run()
    assert without_times(again) == without_times(found)
    assert [folder.split("/", 1)[1] for folder in trained] == ["ours-seed1/finetuning"]


@pytest.mark.slow
def test_an_interrupted_study_goes_on_to_the_same_numbers(
    finished: tuple[Path, list[dict[str, Any]]], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = finished
    steps = 0
    step = BiSSLTrainer.training_step

    def failing(trainer: BiSSLTrainer, *args: Any) -> Any:
        nonlocal steps
        steps += "ours-seed0/backbone" in str(trainer.args.output_dir)
        if steps == 2:
            raise KeyboardInterrupt
        return step(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BiSSLTrainer, "training_step", failing)
        with pytest.raises(KeyboardInterrupt):
            study_of(images, tmp_path).run()
    assert not list(tmp_path.rglob("ours-seed1/result.json"))
    assert list(tmp_path.rglob("plain-seed0/result.json"))
    assert without_times(study_of(images, tmp_path).run()) == without_times(found)


def test_wall_clock_gives_the_steps_that_fit(images: Path, tmp_path: Path) -> None:
    """At 2 seconds per 3 steps, 5 seconds are worth 7 whole steps of the same batch, and 3 of one twice as large."""
    study = study_of(images, tmp_path)
    plain = study.plan.baseline
    batch = study.plan.continue_arguments("unused", 0, plain, 1).per_device_train_batch_size
    twice = Arm("twice", "conventional", "wall_clock", {"per_device_train_batch_size": 2 * batch})
    paced = {"steps": 3, "seconds": 9.0, "processor_seconds": 2.0}
    clock = {"processor_seconds": 5.0, "seconds": 1.0}
    assert study.backbones.fitting_steps(plain, plain, clock, paced, 0) == 7
    assert study.backbones.fitting_steps(twice, plain, clock, paced, 0) == 3
    assert study.backbones.fitting_steps(plain, plain, {**clock, "processor_seconds": 0.1}, paced, 0) == 1


def test_other_settings_are_refused_before_anything_runs(
    images: Path, finished: tuple[Path, list[dict[str, Any]]]
) -> None:
    output, _ = finished
    with pytest.raises(
        ValueError, match="pretrain-seed0 was begun with other settings: pretrain_steps was 3 and is 4"
    ):
        study_of(images, output, pretrain_steps=4)


def test_settings_can_be_corrected_before_a_part_begins(images: Path, tmp_path: Path) -> None:
    study = study_of(images, tmp_path, finetune={"max_grad_norm": 9.0})
    study.parts[0].part.begin()
    study_of(images, tmp_path, finetune={"max_grad_norm": 0.1})
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == [
        "parts/pretrain-seed0/settings.json"
    ]


@pytest.mark.parametrize("name", ["plain-seed0/result.json", "ours-seed1/backbone/settings.json"])
def test_damaged_files_are_named_before_anything_runs(
    images: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path, name: str
) -> None:
    shutil.copytree(finished[0], tmp_path / "out")
    file = next(path for path in (tmp_path / "out").rglob("*.json") if str(path).endswith(name))
    file.write_text("")
    with pytest.raises(ValueError, match=f"{name} is empty or damaged"):
        study_of(images, tmp_path / "out")


def test_numbers_of_labels_that_a_set_lacks_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^train_examples on .*: 99 labelled examples are asked for"):
        study_of(images, tmp_path, train_examples=[99])


def test_too_few_validation_images_are_called_so(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^validation_examples on .*: 2 labelled examples are asked for; .* 3, one"):
        study_of(images, tmp_path, validation_examples=2)


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("pretrain", {"warmup_steps": 50}, "pretrain: The warm-up .* 50 steps; it must fit into the 3 steps"),
        ("pretrain", {"optim_args": "nesterov=True,x=1"}, "pretrain: LARS .* does not take nesterov, x"),
        ("bissl", {"lower_optim_args": "x=1"}, "arm plain: LARS .* does not take x"),
        ("bissl", {"warmup_steps": 50}, "arm ours: The warm-up .* 50 steps; it must fit into the 2 steps"),
        ("bissl", {"optim_args": "x=1"}, "arm ours: SGD .* does not take x"),
        ("finetune", {"warmup_steps": 50}, "finetune: The warm-up .* 50 steps; it must fit into the 4 steps"),
        ("finetune", {"optim_args": "x=1"}, "finetune: SGD .* does not take x"),
        (
            "finetune",
            {"metric_for_best_model": "acuracy"},
            "finetune: metric_for_best_model is 'acuracy'; it must be one of loss, accuracy, mean_class_accuracy",
        ),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_come_to_light_before_training(
    images: Path, tmp_path: Path, trained: list[str], stage: str, changes: dict[str, Any], message: str
) -> None:
    settings = SETTINGS.get(stage, {}) | changes
    study = study_of(images, tmp_path, **{stage: settings})
    with pytest.raises(ValueError, match=message):
        study.try_out()
    assert trained == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_settings_that_fit_pass(images: Path, tmp_path: Path, trained: list[str]) -> None:
    finetune = {**SETTINGS["finetune"], "metric_for_best_model": "eval_accuracy"}
    study_of(images, tmp_path, finetune=finetune).try_out()
    assert trained == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_the_report_shows_the_comparison(
    images: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    output, _ = finished
    runs = [
        {"dataset": "d", "train_examples": 12, "arm": arm, "seed": seed, "metric": "accuracy", "score": score,
         "features": {"knn": 0.5}}
        for arm, scores in (("plain", (0.5, 0.6, 0.7)), ("ours", (0.51, 0.62, 0.73)))
        for seed, score in enumerate(scores)
    ]  # fmt: skip
    shown = write_report(build_results(study_of(images, output).plan, runs), tmp_path)
    assert max(map(len, shown.splitlines())) <= 100
    for text in (" ".join(shown.split()), (tmp_path / "table.md").read_text()):
        assert "62.00 ± 11.00" in text
        assert "+2.00" in text
        assert "-0.48 to +4.48" in text
        assert "0.074" in text
        assert "3 common pretext steps, then 2 more, as many as BiSSL takes" in text
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == runs
    assert (tmp_path / "figures" / "study.png").stat().st_size > 5000


def test_sets_are_told_apart_in_the_report(
    images: Path, finished: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    runs = [
        {"dataset": name, "train_examples": 12, "arm": arm, "seed": 0, "metric": "accuracy", "score": 0.5}
        for name in ("x/images", "y/images/", "images", "x/others")
        for arm in ("plain", "ours")
    ]
    write_report(build_results(study_of(images, finished[0]).plan, runs), tmp_path)
    cells = [line.split(" | ")[0] for line in (tmp_path / "table.md").read_text().splitlines() if "| ours |" in line]
    assert cells == [f"| {name}" for name in ("x/images", "y/images", "images", "others")]
