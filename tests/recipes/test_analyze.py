"""The analysis as users start it: what it takes, what it leaves, what it refuses."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from transformers import ResNetForImageClassification

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining
from bissl_hf.cli import analyze, running
from bissl_hf.data.augment import image_processor

from .runs import CLASSES, as_arguments, printed_by, refusal, resnet_config, write_splits


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_splits(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    simclr = SimCLRForPreTraining(SimCLRConfig(backbone_config=resnet_config(), projection_dims=(6, 5)))
    classifier = ResNetForImageClassification(resnet_config())
    simclr.save_pretrained(root / "simclr")
    classifier.save_pretrained(root / "classifier")
    both = BiSSLModel.from_models(simclr, classifier)
    with torch.no_grad():
        for parameter in both.upper.base_model.parameters():
            parameter.mul_(1.5)
    both.save_pretrained(root / "bilevel")
    return root


def settings(images: Path, output: Path, *checkpoints: Path, **changes: Any) -> list[str]:
    return as_arguments(
        {
            "checkpoints": list(checkpoints),
            "dataset": images,
            "image_size": 16,
            "output_dir": output,
            "knn_neighbors": 3,
            "batch_size": 10,
            "use_cpu": True,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def analysed(images: Path, models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("analysed") / "out"
    checkpoints = [models / name for name in ("simclr", "classifier", "bilevel")]
    return output, printed_by(analyze.main, settings(images, output, *checkpoints, recalibrate=False))


NAMES = ["simclr", "classifier", "bilevel, lower level", "bilevel, upper level"]


def test_figures_of_all_kinds_of_checkpoints_are_printed_and_kept(analysed: tuple[Path, str]) -> None:
    output, printed = analysed
    results = json.loads((output / "all_results.json").read_text())
    assert set(results["checkpoints"]) == set(NAMES)
    assert results["images"] == {"train": 36, "validation": 6, "test": 24}
    for name, report in results["checkpoints"].items():
        (row,) = [line for line in printed.splitlines() if line.startswith(f"{name}  ")]
        shown = [f"{100 * report['knn']:.2f} %", f"{100 * report['probe']:.2f} %", f"{report['silhouette']:.3f}"]
        assert all(figure in row for figure in [*shown, f"{report['scatter_ratio']:.3f}"])
        assert results["cka"][name][name] == pytest.approx(1)
    cka = results["cka"]["simclr"]
    assert cka["bilevel, lower level"] == pytest.approx(1)
    assert cka["classifier"] < 0.9999
    for figure in ("tsne.png", "cka.png"):
        with Image.open(output / "figures" / figure) as picture:
            assert len(picture.convert("RGB").resize((200, 80)).getcolors(200 * 80)) > 20


def test_figures_are_those_of_the_plain_model_on_the_raw_files(
    analysed: tuple[Path, str], images: Path, models: Path
) -> None:
    """By `transformers` and scikit-learn alone: the nearest neighbours of the classifier's features, unweighted."""
    model = ResNetForImageClassification.from_pretrained(models / "classifier").eval()
    processor = image_processor(16)
    features, labels = {}, {}
    for split in ("train", "test"):
        paths = sorted((images / split).rglob("*.png"))
        pictures = [Image.open(path).convert("RGB") for path in paths]
        with torch.no_grad():
            outputs = model.resnet(processor(pictures, return_tensors="pt").pixel_values)
        features[split] = outputs.pooler_output.flatten(1).numpy()
        labels[split] = np.array([CLASSES.index(path.parent.name) for path in paths])

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    votes = KNeighborsClassifier(3, metric="cosine", weights=weights).fit(features["train"], labels["train"])
    expected = (votes.predict(features["test"]) == labels["test"]).mean()
    report = json.loads((analysed[0] / "all_results.json").read_text())["checkpoints"]["classifier"]
    assert report["knn"] == pytest.approx(expected)
    centred = features["test"] - features["test"].mean(axis=0)
    assert report["within_class_scatter"] + report["between_class_scatter"] == pytest.approx(
        (centred**2).sum(axis=1).mean(), rel=1e-4
    )


def test_one_checkpoint_with_few_images_and_its_own_statistics(
    images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    analyze.main(settings(images, tmp_path / "out", models / "simclr", names=["mine"], max_images=20, tsne_classes=2))
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert results["images"] == {"train": 20, "validation": 6, "test": 20}
    assert [path.name for path in (tmp_path / "out" / "figures").iterdir()] == ["tsne.png"]
    assert "mine" in capsys.readouterr().out


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [2, 2]), (4, [4]), (9, [5])])
def test_batch_norm_is_estimated_on_whole_batches(batch_size: int, sizes: list[int]) -> None:
    rows = [{"pixel_values": torch.zeros(3, 4, 4)} for _ in range(5)]
    arguments = SimpleNamespace(batch_size=batch_size)
    analysis: Any = SimpleNamespace(
        splits={"train": rows}, arguments=arguments, device="cpu", transform=lambda inputs, key: inputs
    )
    batches = analyze.Analysis.batches(analysis, "train", whole=True)
    assert [len(batch["pixel_values"]) for batch in batches] == sizes


def test_figures_that_are_not_defined_are_null() -> None:
    assert analyze.finite({"a": 0.5, "b": float("nan"), "c": float("inf")}) == {"a": 0.5, "b": None, "c": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_images": 3}, "max_images is 3; it must be at least 4"),
        ({"tsne_classes": 0}, "tsne_classes is 0; it must be at least 1"),
        ({"knn_neighbors": 0}, "knn_neighbors is 0; it must be at least 1"),
        ({"names": ["a", "b"]}, "names has 2 entries for 1 checkpoints; give one for each"),
        (
            {"checkpoints": ["simclr", "simclr"]},
            "Two checkpoints are called 'simclr'; give them different names",
        ),
        ({"checkpoints": ["no/such/folder"]}, "checkpoints is 'no/such/folder'; there is no such folder"),
        ({"dataset": "digitz"}, "There is no data set 'digitz'.*Did you mean 'digits'"),
        ({"checkpoints": None}, "the following arguments are required: --checkpoints; see --help"),
        ({"tsne_images": "many"}, "argument --tsne_images.*invalid int value: 'many'"),
    ],
)
def test_bad_input_is_one_sentence(
    changes: dict[str, Any],
    message: str,
    images: Path,
    models: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(models)
    sentence = refusal(capsys, analyze.main, settings(images, tmp_path / "out", Path("simclr"), **changes))
    assert re.search(message, sentence), sentence


def test_a_folder_with_files_is_left_alone(
    images: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds files" in refusal(capsys, analyze.main, settings(images, tmp_path, models / "simclr"))


def test_one_process_analyses(
    images: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(running, "PartialState", lambda cpu=None: SimpleNamespace(num_processes=2))
    sentence = refusal(capsys, analyze.main, settings(images, tmp_path / "out", models / "simclr"))
    assert "The analysis runs on 2 processes; start it on one: --num_processes 1" in sentence
