"""Classifies images into a CSV file.

    bissl-hf predict --model outputs/aligned --inputs photos/ more/one.png --output predictions.csv

Any image classifier of transformers serves: what align, joint and finetune write, or a model of the Hub. A row has the
file, its label with the score, and the next labels (`label_2`, `score_2`, ...). Scores are probabilities: of one class
among all, or with several labels of each class by itself. Files that cannot be read are listed at the end.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel

from ..data.reading import decode_image, reason_of
from ..evaluation.metrics import MULTI_LABEL, REGRESSION
from ..models.loading import load_pretrained
from ..text import for_terminal, format_table
from .arguments import parse_arguments, refusing_bad_input
from .console import prepare_console
from .loading import load_config, loading
from .running import check_one_process

_ROWS_SHOWN = 5


@dataclass
class PredictionInputs:
    """What classifies what."""

    model: str = field(metadata={"help": "Image classifier: a folder or Hub id."})
    inputs: list[str] = field(metadata={"help": "Images: files, and folders that are searched for them."})
    output: str = field(default="predictions.csv", metadata={"help": "CSV file to write."})
    top_k: int = field(default=5, metadata={"help": "Labels per image, at most as many as the model has."})
    batch_size: int = field(default=64, metadata={"help": "Images per batch."})
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU although there is a GPU."})

    def __post_init__(self) -> None:
        for name in ("top_k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")


def find_images(inputs: Sequence[str]) -> list[Path]:
    """Returns the files that are named, and those below the folders that are named whose suffix is that of an image,
    in the order of their names; hidden ones are left out.

    Raises:
        `ValueError`: if something that is named does not exist, or there is no image.
    """
    suffixes, found = set(Image.registered_extensions()), []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            below = (file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
            found += sorted(f for f in below if not any(p.startswith(".") for p in f.relative_to(path).parts))
        elif path.is_file():
            found.append(path)
        else:
            raise ValueError(f"inputs names {name!r}; there is no such file or folder.")
    if not found:
        raise ValueError(f"inputs is {', '.join(inputs)}; there are no images in there.")
    return list(dict.fromkeys(found))


class Classifier:
    """A model with its image processor.

    Args:
        source (`str`): a folder or Hub id.
        device (`torch.device`)

    Raises:
        `ValueError`: if it cannot be loaded as an image classifier with an image processor.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        load_config("model", source)
        with loading("model", source):
            self.processor: Any = AutoImageProcessor.from_pretrained(source)
            model: PreTrainedModel = load_pretrained(AutoModelForImageClassification, source)
        self.device = device
        self.model: Any = model.to(device).eval()  # type: ignore[arg-type]

    @property
    def problem_type(self) -> str | None:
        return self.model.config.problem_type

    @torch.no_grad()
    def scores(self, images: list[Image.Image]) -> Tensor:
        """Returns the scores of images, shape `(images, labels)`, on the CPU."""
        inputs = self.processor(images=images, return_tensors="pt").to(self.device)
        logits = self.model(**inputs).logits.float().cpu()
        if self.problem_type == REGRESSION:
            return logits
        return logits.sigmoid() if self.problem_type == MULTI_LABEL else logits.softmax(-1)

    def rows(self, scores: Tensor, top_k: int) -> list[list[str]]:
        """Returns the columns after the file name for each image."""
        if self.problem_type == REGRESSION:
            return [[f"{value:.6g}" for value in row] for row in scores.tolist()]
        best = scores.topk(top_k, dim=-1)
        names = self.model.config.id2label
        return [
            [text for number, value in zip(numbers, values, strict=True) for text in (names[number], f"{value:.6f}")]
            for numbers, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def header(self, top_k: int) -> list[str]:
        """Returns the names of the columns."""
        if self.problem_type == REGRESSION:
            return ["file", *(self.model.config.id2label[number] for number in range(self.model.config.num_labels))]
        endings = ["", *(f"_{number}" for number in range(2, top_k + 1))]
        return ["file", *(f"{name}{ending}" for ending in endings for name in ("label", "score"))]


def read_batches(
    files: Sequence[Path], batch_size: int, unreadable: dict[Path, str]
) -> Iterator[tuple[list[Path], list[Image.Image]]]:
    """Yields files with their images, upright and in RGB.

    Args:
        files (`Sequence[Path]`)
        batch_size (`int`): files per batch; what cannot be read leaves a gap.
        unreadable (`dict[Path, str]`): receives the files that cannot be read, with the reason.
    """
    for start in tqdm(range(0, len(files), batch_size), desc="Classifying", unit="batch"):
        read, images = [], []
        for file in files[start : start + batch_size]:
            try:
                with file.open("rb") as stream:
                    image, _ = decode_image(stream)
            except MemoryError:
                raise
            # Every decoder has errors of its own, from KeyError to struct.error.
            except Exception as error:
                unreadable[file] = reason_of(error)
            else:
                read.append(file)
                images.append(image)
        if read:
            yield read, images


def write_predictions(
    classifier: Classifier, files: Sequence[Path], output: Path, *, top_k: int, batch_size: int
) -> tuple[list[dict[str, str]], dict[Path, str]]:
    """Writes the CSV file, aside first, so that a file of that name is whole.

    Returns:
        `tuple`: the first rows, and the files that could not be read with the reasons.
    """
    top_k = min(top_k, classifier.model.config.num_labels)
    header = classifier.header(top_k)
    shown: list[dict[str, str]] = []
    unreadable: dict[Path, str] = {}
    staging = output.with_name(f".{output.name}.tmp")
    # Names of files that are no UTF-8 are written as they are.
    with staging.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        for read, images in read_batches(files, batch_size, unreadable):
            columns = classifier.rows(classifier.scores(images), top_k)
            rows = [[str(file), *row] for file, row in zip(read, columns, strict=True)]
            writer.writerows(rows)
            shown += [dict(zip(header, row, strict=True)) for row in rows[: _ROWS_SHOWN - len(shown)]]
    staging.replace(output)
    return shown, unreadable


def print_summary(output: Path, num_files: int, shown: list[dict[str, str]], unreadable: dict[Path, str]) -> None:
    """Prints the first rows, and to stderr what could not be read."""
    if shown:
        columns = list(shown[0])[:5]  # the rest is in the file
        print(f"\n{format_table([{name: row[name] for name in columns} for row in shown])}\n")
    print(f"The predictions for {num_files - len(unreadable)} of {num_files} images are in {for_terminal(output)}.")
    if unreadable:
        print(f"{len(unreadable)} could not be read:", file=sys.stderr)
        for file, reason in unreadable.items():
            print(f"    {for_terminal(file)}: {for_terminal(reason)}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    (options,) = parse_arguments((PredictionInputs,), arguments, description=str(__doc__).split("\n\n")[-1])
    prepare_console()
    output = Path(options.output).expanduser()
    with refusing_bad_input():
        check_one_process("predict", cpu=options.use_cpu)
        if output.exists():
            raise ValueError(f"output {output} exists already; choose another file.")
        files = find_images(options.inputs)
        classifier = Classifier(options.model, PartialState(cpu=options.use_cpu).device)
        output.parent.mkdir(parents=True, exist_ok=True)
    shown, unreadable = write_predictions(
        classifier, files, output, top_k=options.top_k, batch_size=options.batch_size
    )
    print_summary(output, len(files), shown, unreadable)


if __name__ == "__main__":
    main()
