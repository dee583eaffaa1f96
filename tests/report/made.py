"""A report of a run that never was."""

from dataclasses import replace

import numpy as np

from bissl_hf.cards.record import ModelRecord, RunRecord, Settings
from bissl_hf.report.pictures import png_uri
from bissl_hf.report.record import Evaluated, Picture, Report

NAMES = ("airplane", "a <b>bold</b> name", "ship $x_1$", "‮reversed", "dog")
NUM_TEST = 300


def made_run(kind: str = "aligned", alternations: int = 8) -> RunRecord:
    rng = np.random.default_rng(0)
    history = []
    for epoch in range(1, alternations + 1):
        history.append(
            {
                "epoch": float(epoch), "step": 12 * epoch, "loss": 4 - 0.1 * epoch, "lower/loss": 4 - 0.1 * epoch,
                "upper/loss": 1 / epoch, "upper/direct_loss": 0.8 / epoch, "levels/pull": 0.7 * epoch,
                "solver/residual": float(10 ** rng.uniform(-3, 0.5)), "alignment/cosine": float(rng.normal(0.1, 0.05)),
                "levels/distance": 0.01 * epoch, "levels/moved": 0.03 * epoch**0.5,
            }
        )  # fmt: skip
        history.append(
            {"epoch": float(epoch), "step": 12 * epoch, "eval_accuracy": 0.7 + 0.02 * epoch, "eval_loss": 1 / epoch,
             "eval_upper_accuracy": 0.65 + 0.02 * epoch, "eval_upper_loss": 1.2 / epoch,
             "knn_accuracy": 0.5 + 0.03 * epoch,}
        )  # fmt: skip
    classifier = ModelRecord(
        "ResNetForImageClassification", "resnet", 11_181_642, task="image-classification",
        loader="AutoModelForImageClassification", has_pipeline=True, processor="AutoImageProcessor",
        class_names=NAMES, takes_images=True,
    )  # fmt: skip
    pretext = ModelRecord("SimCLRForPreTraining", "simclr", 12_000_000, takes_images=True)
    return RunRecord(
        kind=kind,
        models={"upper": classifier, "lower": pretext} if kind in ("aligned", "joint") else {"model": classifier},
        arguments={"num_alternations": alternations, "lower_steps": 8, "upper_steps": 4},
        settings={"Both levels": Settings({"damping": 50.0, "seed": 42}, {"damping": 10.0, "seed": 42})},
        log_history=history,
        steps=12 * alternations,
        versions={"bissl_hf": "0.2", "torch": "2.9"},
    )


def made_evaluation(model: str, split: str, accuracy: float, seed: int) -> Evaluated:
    rng = np.random.default_rng(seed)
    labels = np.arange(NUM_TEST) % len(NAMES)
    predicted = np.where(rng.random(NUM_TEST) < accuracy, labels, rng.integers(0, len(NAMES), NUM_TEST))
    metrics = {"accuracy": float((labels == predicted).mean()), "loss": 0.5, "mean_class_accuracy": 0.8}
    return Evaluated(model, split, labels, predicted, rng.uniform(0.3, 1, NUM_TEST), metrics, NUM_TEST)


def made_picture(*lines: str, images: int = 1, side: int = 40, seed: int = 0) -> Picture:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (images, 3, 5, 5)).astype(np.uint8)
    return Picture([png_uri(image.repeat(side // 5, 1).repeat(side // 5, 2)) for image in small], lines, "a <sample>")


def made_report(kind: str = "aligned") -> Report:
    before = [made_evaluation("head, before", split, 0.7, seed) for seed, split in enumerate(("validation", "test"))]
    after = [
        made_evaluation("aligned, after", split, 0.8, 9 + seed) for seed, split in enumerate(("validation", "test"))
    ]
    per_class = [
        {name: float((e.predicted[e.labels == n] == n).mean()) for n, name in enumerate(NAMES)}
        for e in (before[1], after[1])
    ]
    return Report(
        title="Alignment <script>alert(1)</script> with digits",
        run=made_run(kind),
        data={"Labelled images": "digits: 1,295 train, 143 validation, 300 test"},
        before=before,
        after=after,
        per_class_before=per_class[0],
        per_class=per_class[1],
        class_names=NAMES,
        conclusions=["Difference after minus before: +7.3 points.", "Pull 5.6 over the run: good <range>."],
        start={"eval_accuracy": 0.66},
        views=[made_picture(NAMES[n % 5], images=3, seed=n) for n in range(8)],
        errors=[
            made_picture(f"is {NAMES[n % 5]}", f"taken for {NAMES[(n + 1) % 5]}, 97 %", seed=n) for n in range(20)
        ],
        seconds={"Pre-training": 700.0, "Head warm-up": 21.3, "Lower steps": 200.0, "Upper steps": 480.5},
        folder="outputs/<digits>",
        next_steps=["bissl-hf finetune --model outputs/<digits> --dataset digits"],
    )


def with_many_classes(report: Report, number: int = 40) -> Report:
    names = [f"class {index}" for index in range(number)]
    scores = {name: index / number for index, name in enumerate(names)}
    return replace(report, class_names=names, per_class=scores, per_class_before={}, before=())
