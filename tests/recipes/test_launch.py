"""The recipe on two processes, as `accelerate launch` starts it from the configurations in recipes/accelerate."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForImageClassification

from bissl_hf import load_image_dataset
from bissl_hf.data.augment import EvalTransform
from bissl_hf.data.decoded import DecodedImages

from .runs import ROOT, as_arguments, environment, resnet_config, write_splits
from .watching import watched, writers

CONFIGURATIONS = ROOT / "recipes" / "accelerate"
STARTS = {"cpu": (1, 1), "one_gpu": (1, 1), "one_machine": (1, 8), "two_machines": (2, 16)}


def start(configuration: str, output: Path, images: Path, *options: str, **changes: str) -> subprocess.Popen[str]:
    """Starts the recipe through the launcher, on two processes in all."""
    values: dict[str, Any] = {
        "dataset": images, "backbone": images.parent / "backbone", "backbone_init": "random", "image_size": 16,
        "projection_dims": [6, 5], "output_dir": output, "num_alternations": 3, "lower_steps": 2, "upper_steps": 2,
        "per_device_lower_batch_size": 6, "per_device_train_batch_size": 6, "per_device_eval_batch_size": 5,
        "pretrain_steps": 4, "head_warmup_epochs": 1, "learning_rate": 0.05, "proximal_weight": 1.0, "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": True,
    }  # fmt: skip
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", *options]
    launcher += ["--config_file", str(CONFIGURATIONS / f"{configuration}.yaml")]
    return subprocess.Popen(
        [*launcher, str(ROOT / "recipes" / "bissl.py"), *as_arguments(values)],
        env=environment(**changes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(run: subprocess.Popen[str]) -> str:
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, err
    return out


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    resnet_config().save_pretrained(root / "backbone")
    return write_splits(root / "images")


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, set[str]]]:
    """The output of an uninterrupted run, what it printed, and for each file the processes that wrote it."""
    root = tmp_path_factory.mktemp("whole")
    run = start("one_machine", root / "out", images, **watched(root / "out", root / "notes"))
    printed = finish(run)
    return root / "out", printed, writers(root / "notes")


@pytest.mark.parametrize("name", STARTS)
def test_configurations_say_how_many_machines_and_processes(name: str) -> None:
    assert {path.stem for path in CONFIGURATIONS.glob("*.yaml")} == set(STARTS)
    content = yaml.safe_load((CONFIGURATIONS / f"{name}.yaml").read_text())
    assert (content["num_machines"], content["num_processes"]) == STARTS[name]
    assert content["distributed_type"] == ("MULTI_GPU" if STARTS[name][1] > 1 else "NO")
    assert content["mixed_precision"] == "no", "the precision is the run's own setting"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_each_file_once(whole: tuple[Path, str, dict[str, set[str]]]) -> None:
    output, printed, written = whole
    assert (output / "checkpoint-12" / "rng_state_1.pth").is_file(), "there were two processes"
    assert (
        json.loads((output / "checkpoint-12" / "run_state.json").read_text())["settings"]["number of processes"] == 2
    )
    assert {"model.safetensors", "all_results.json"} <= {Path(path).name.removeprefix(".") for path in written}
    assert {path: ranks for path, ranks in written.items() if len(ranks) > 1} == {}
    assert printed.count("Pre-training of SimCLRForPreTraining") == 1
    assert printed.count("after: aligned") == 2, "once on each held-out split"


@pytest.mark.slow
@pytest.mark.distributed
def test_metrics_of_two_processes_are_those_of_the_model_they_leave(
    whole: tuple[Path, str, dict[str, set[str]]], images: Path
) -> None:
    """24 test images do not divide into batches of 5 on two processes."""
    output, _, _ = whole
    results = json.loads((output / "all_results.json").read_text())
    test = DecodedImages.from_dataset(load_image_dataset(images)["test"], image_size=16)
    rows = [test[row] for row in range(len(test))]
    inputs = EvalTransform(16)({"pixel_values": torch.stack([row["pixel_values"] for row in rows])}, (0,))
    labels = torch.tensor([row["labels"] for row in rows])
    with torch.no_grad():
        found = AutoModelForImageClassification.from_pretrained(output).eval()(**inputs, labels=labels)
    assert len(rows) == 24
    assert results["test_loss"] == pytest.approx(float(found.loss), rel=1e-5)
    assert results["test_accuracy"] == pytest.approx(float((found.logits.argmax(-1) == labels).double().mean()))
    layout = json.loads((output / "before.json").read_text())
    assert (len(layout["layout"]), layout["labels"]) == (24, labels.tolist())


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_run_goes_on_on_two_machines(
    whole: tuple[Path, str, dict[str, set[str]]], images: Path, tmp_path: Path
) -> None:
    """Killed inside the second alternation on one machine; gone on with by two launchers, each with one process."""
    output = tmp_path / "out"
    run = start("one_machine", output, images)
    deadline = time.monotonic() + 200
    while not (output / "checkpoint-5").is_dir() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (output / "checkpoint-5").is_dir()
    assert run.poll() is None, "the run was over before it could be killed"
    # The launcher puts its workers into sessions of their own.
    for process in [*psutil.Process(run.pid).children(recursive=True), run]:
        process.kill()
    run.communicate()
    assert not (output / "all_results.json").exists()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    machines = [
        start("two_machines", output, images, "--main_process_port", port, "--machine_rank", str(number))
        for number in range(2)
    ]
    for machine in machines:
        finish(machine)
    for name in ("model.safetensors", "bilevel/model.safetensors"):
        assert (output / name).read_bytes() == (whole[0] / name).read_bytes()
