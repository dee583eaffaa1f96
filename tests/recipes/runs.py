"""What the tests of recipes share: tiny images, tiny models, and starting a recipe."""

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import ResNetConfig

ROOT = Path(__file__).parents[2]
CLASSES = ("cat", "dog", "emu")
MODES = ("L", "RGB", "RGBA", "P")
SIZES = ((24, 18), (17, 30), (20, 20))
PROGRESS = re.compile(r"(Loading weights|Generating train split): ")


def resnet_config(depth: int = 1, num_labels: int = len(CLASSES)) -> ResNetConfig:
    return ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 6], depths=[1, depth], layer_type="basic", num_labels=num_labels
    )


def write_images(folder: Path, per_class: int, seed: int) -> None:
    """Writes PNG files of mixed modes and sizes; each class is noise around a brightness of its own."""
    generator = np.random.default_rng(seed)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            width, height = SIZES[(index + number) % len(SIZES)]
            low = 80 * number
            pixels = generator.integers(low, low + 90, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(MODES[index % len(MODES)]).save(folder / name / f"{index:02d}.png")


def write_splits(root: Path) -> Path:
    """Writes a folder with the three splits: 36 training, 6 validation and 24 test images."""
    for seed, (split, per_class) in enumerate({"train": 12, "validation": 2, "test": 8}.items()):
        write_images(root / split, per_class, seed)
    return root


def as_arguments(values: dict[str, Any]) -> list[str]:
    """Turns fields into a command line; `None` leaves an argument out."""
    arguments: list[str] = []
    for name, value in values.items():
        if value is not None:
            items = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(item) for item in items)]
    return arguments


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


def launch(recipe: str | Path, arguments: list[str], *, processes: int = 1, **changes: str) -> str:
    """Runs a recipe through the launcher; returns what it printed."""
    configuration = ROOT / "recipes" / "accelerate" / ("cpu.yaml" if processes == 1 else "one_machine.yaml")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(configuration)]
    launcher += ["--num_processes", str(processes), str(ROOT / "recipes" / recipe)]
    done = subprocess.run(
        [*launcher, *arguments], env=environment(**changes), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def printed_by(main: Callable[[list[str]], None], arguments: list[str]) -> str:
    """Runs a command in this process; returns what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(arguments)
    return printed.getvalue()


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], None], arguments: list[str]) -> str:
    """Runs a recipe in this process; returns its one sentence after the checks that hold for every refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert "Pre-training" not in out
    return only_sentence(err)


def only_sentence(stderr: str) -> str:
    """Returns the sentence that ends what a refused run writes. Nothing but progress bars may come before it."""
    *bars, sentence = stderr.removesuffix("\n").splitlines()
    assert sentence.startswith("error: "), stderr
    assert [bar for bar in bars if bar and not PROGRESS.match(bar)] == []
    return sentence
