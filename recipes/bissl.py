"""Aligns a pre-trained backbone with a downstream task by BiSSL.

    accelerate launch recipes/bissl.py --config recipes/configs/digits.yaml [--any_field value]

Started from nothing it pre-trains with SimCLR first. Then it trains a head on the frozen backbone, solves the bilevel
problem, and writes an ordinary transformers checkpoint of the aligned model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, Subset
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from bissl_hf import (
    BiSSLModel,
    BiSSLTrainer,
    BiSSLTrainingArguments,
    SimCLRConfig,
    SimCLRForPreTraining,
    TwoViewTransform,
    load_image_dataset,
)
from bissl_hf.cli import RESULTS_NAME, format_table, open_output_dir, parse_arguments, refusing_bad_input
from bissl_hf.data.alternation import StepKey, Stream
from bissl_hf.data.augment import EvalTransform, TrainTransform, image_processor
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.evaluation.features import extract_features, tsne_layout
from bissl_hf.evaluation.figures import plot_layouts, plot_run
from bissl_hf.evaluation.metrics import classification_metrics
from bissl_hf.models.configuration_simclr import resnet18_config
from bissl_hf.trainer.checkpoints import STAGING_FOLDER, find_last_checkpoint, publish, write_json
from bissl_hf.trainer.optimizer import resolve_optimizer
from bissl_hf.trainer.pretext_trainer import PretextTrainer
from bissl_hf.trainer.training_args import PretextTrainingArguments

TSNE_ROWS = 1000


@dataclass
class DataArguments:
    """What the two levels learn from, and how their views are made."""

    dataset: str = field(
        default="digits", metadata={"help": "Labelled images: digits, a folder, a Parquet file or a Hub id."}
    )
    lower_dataset: str | None = field(
        default=None,
        metadata={"help": "Unlabelled images, likewise; else the `unlabeled` split or training images of --dataset."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of images; found by itself if usual."})
    label_column: str | None = field(default=None, metadata={"help": "Column of labels; found by itself if usual."})
    image_size: int = field(default=96, metadata={"help": "Side of the square images that the model sees, in pixels."})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0], metadata={"help": "Smallest and largest area of a random crop."}
    )
    crop_ratio: list[float] = field(
        default_factory=lambda: [0.5, 1.0], metadata={"help": "Smallest and largest aspect ratio of a random crop."}
    )
    horizontal_flip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    color_jitter: float = field(default=0.8, metadata={"help": "Probability of colour jitter in a view."})
    grayscale: float = field(default=0.2, metadata={"help": "Probability of greyscale in a view."})
    blur: list[float] = field(
        default_factory=lambda: [1.0, 0.1], metadata={"help": "Probabilities of blur in the two views."}
    )
    solarize: list[float] = field(
        default_factory=lambda: [0.0, 0.2], metadata={"help": "Probabilities of solarisation in the two views."}
    )


@dataclass
class ModelArguments:
    """Where the models come from, and the pre-training that precedes BiSSL."""

    lower_model: str | None = field(default=None, metadata={"help": "Pre-trained SimCLR model: a folder or Hub id."})
    backbone: str | None = field(
        default=None, metadata={"help": "Backbone to start from: a folder or Hub id; a ResNet-18 if not given."}
    )
    backbone_init: str = field(
        default="pretrained",
        metadata={"help": "pretrained: load --backbone's weights; random: its architecture only."},
    )
    upper_model: str | None = field(default=None, metadata={"help": "Image classifier whose head is kept."})
    projection_dims: list[int] = field(
        default_factory=lambda: [256, 256, 256], metadata={"help": "Widths of the projection head."}
    )
    temperature: float = field(default=0.5, metadata={"help": "Temperature of the NT-Xent loss."})
    pretrain_steps: int | None = field(
        default=None, metadata={"help": "SimCLR steps before BiSSL; 1000 if not given, 0 with --lower_model."}
    )
    pretrain_batch_size: int | None = field(
        default=None, metadata={"help": "Batch per device in pre-training; per_device_lower_batch_size if not given."}
    )
    pretrain_learning_rate: float = field(default=4.8, metadata={"help": "Learning rate of pre-training."})
    pretrain_weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay of pre-training."})
    pretrain_warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up; below 1 a fraction of the steps."})
    pretrain_optim: str = field(default="lars", metadata={"help": "Optimizer of pre-training."})


@dataclass
class Images:
    """The decoded data of a run."""

    train: DecodedImages
    validation: DecodedImages
    test: DecodedImages
    lower: DecodedImages
    class_names: list[str]


def load_images(arguments: DataArguments, seed: int) -> Images:
    columns: dict[str, Any] = {"image_column": arguments.image_column, "label_column": arguments.label_column}
    labelled = load_image_dataset(arguments.dataset, seed=seed, **columns)
    class_names = labelled["train"].features["label"].names
    if len(class_names) < 2:
        raise ValueError(
            f"{arguments.dataset} has a single class, {class_names[0]!r}; there is nothing to tell apart."
        )
    if arguments.lower_dataset:
        source = load_image_dataset(arguments.lower_dataset, seed=seed, require_labels=False)
    else:
        source = labelled
    unlabelled = source["unlabeled"] if "unlabeled" in source else source["train"].select_columns("image")

    def decode(split: datasets.Dataset, name: str, *, native_size: bool) -> DecodedImages:
        return DecodedImages.from_dataset(
            split, image_size=arguments.image_size, native_size=native_size, description=f"Decoding {name}"
        )

    return Images(
        train=decode(labelled["train"], "train", native_size=True),
        validation=decode(labelled["validation"], "validation", native_size=False),
        test=decode(labelled["test"], "test", native_size=False),
        lower=decode(unlabelled, "unlabelled", native_size=True),
        class_names=class_names,
    )


def build_lower(arguments: ModelArguments) -> SimCLRForPreTraining:
    heads: dict[str, Any] = {"projection_dims": arguments.projection_dims, "temperature": arguments.temperature}
    if arguments.backbone_init not in ("pretrained", "random"):
        raise ValueError(f"backbone_init is {arguments.backbone_init!r}; it must be pretrained or random.")
    if arguments.lower_model and arguments.backbone:
        raise ValueError("Both lower_model and backbone are given; a lower model brings its backbone, so drop one.")
    if arguments.lower_model:
        config = AutoConfig.from_pretrained(arguments.lower_model)
        if not isinstance(config, SimCLRConfig):
            raise ValueError(
                f"lower_model {arguments.lower_model} is a {config.model_type!r} model; it must be a SimCLR one. To "
                "put a SimCLR head on it pass it as --backbone."
            )
        return SimCLRForPreTraining.from_pretrained(arguments.lower_model)
    if arguments.backbone and arguments.backbone_init == "pretrained":
        return SimCLRForPreTraining.from_backbone(arguments.backbone, **heads)
    backbone = AutoConfig.from_pretrained(arguments.backbone) if arguments.backbone else resnet18_config()
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone, **heads))


def build_upper(arguments: ModelArguments, lower: SimCLRForPreTraining, class_names: list[str]) -> PreTrainedModel:
    if arguments.upper_model:
        upper = AutoModelForImageClassification.from_pretrained(arguments.upper_model)
        if upper.config.num_labels != len(class_names):
            raise ValueError(
                f"upper_model {arguments.upper_model} tells {upper.config.num_labels} classes apart and the data set "
                f"has {len(class_names)}; leave upper_model out for a new head."
            )
        return upper
    config = type(lower.config.backbone_config).from_dict(lower.config.backbone_config.to_dict())
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    return AutoModelForImageClassification.from_config(config)


def check_pairs(args: BiSSLTrainingArguments) -> None:
    """SimCLR compares images, so no part of a pretext batch may hold a single one."""
    curvature_batch = (
        args.curvature_batch_size or args.per_device_lower_batch_size * args.world_size
    ) // args.world_size
    part = args.lower_micro_batch_size
    for name, batch in (
        ("per_device_lower_batch_size", args.per_device_lower_batch_size),
        ("curvature_batch_size", curvature_batch),
    ):
        if batch < 2:
            raise ValueError(f"{name} is {batch}; SimCLR compares images, so it must be at least 2.")
        if part is not None and (part == 1 or batch % part == 1):
            raise ValueError(
                f"lower_micro_batch_size is {part}, which leaves a part of 1 image from {name} {batch}; SimCLR "
                "compares images, so each part needs at least 2."
            )


def build_trainer(
    arguments: DataArguments, args: BiSSLTrainingArguments, model: BiSSLModel, images: Images
) -> BiSSLTrainer:
    check_pairs(args)
    for name in ("crop_scale", "crop_ratio"):
        if len(getattr(arguments, name)) != 2:
            raise ValueError(f"{name} is {getattr(arguments, name)}; it must be two numbers, the lower one first.")
    crop: dict[str, Any] = {
        "crop_scale": tuple(arguments.crop_scale),
        "crop_ratio": tuple(arguments.crop_ratio),
        "horizontal_flip": arguments.horizontal_flip,
    }
    views: dict[str, Any] = {
        "color_jitter": arguments.color_jitter,
        "grayscale": arguments.grayscale,
        "blur": tuple(arguments.blur),
        "solarize": tuple(arguments.solarize),
    }
    return BiSSLTrainer(
        model=model,
        args=args,
        train_dataset=images.train,
        lower_dataset=images.lower,
        eval_dataset=images.validation,
        train_transform=TrainTransform(arguments.image_size, **crop),
        eval_transform=EvalTransform(arguments.image_size),
        lower_transform=TwoViewTransform(arguments.image_size, **crop, **views),
        processing_class=image_processor(arguments.image_size),
        compute_metrics=classification_metrics(),
    )


def check_pretraining(arguments: ModelArguments, steps: int, batch: int, rows_per_process: int) -> None:
    """Names the recipe's own fields where the trainer would name those of its arguments."""
    for name, value, low, high in (
        ("pretrain_steps", steps, 0, float("inf")),
        ("pretrain_batch_size", batch, 2, rows_per_process),
        ("pretrain_learning_rate", arguments.pretrain_learning_rate, 0, float("inf")),
        ("pretrain_weight_decay", arguments.pretrain_weight_decay, 0, float("inf")),
        ("pretrain_warmup_steps", arguments.pretrain_warmup_steps, 0, max(steps, 1)),
    ):
        if not low <= value <= high:
            allowed = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
            raise ValueError(f"{name} is {value}; it must be {allowed}.")
    resolve_optimizer(arguments.pretrain_optim, field="pretrain_optim")


def build_pretrainer(arguments: ModelArguments, args: BiSSLTrainingArguments, trainer: BiSSLTrainer) -> PretextTrainer:
    """The trainer of the stage before BiSSL; it trains the lower model in place."""
    steps, batch = arguments.pretrain_steps, arguments.pretrain_batch_size
    if steps is None:
        steps = 0 if arguments.lower_model else 1000
    if batch is None:
        batch = args.per_device_lower_batch_size
    check_pretraining(arguments, steps, batch, len(trainer.lower_dataset) // args.world_size)
    return PretextTrainer(
        trainer.model.lower,
        PretextTrainingArguments(
            output_dir=str(Path(str(args.output_dir)) / "pretraining"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=arguments.pretrain_learning_rate,
            weight_decay=arguments.pretrain_weight_decay,
            warmup_steps=arguments.pretrain_warmup_steps,
            optim=arguments.pretrain_optim,
            seed=args.seed,
            data_seed=args.data_seed,
            bf16=args.bf16,
            use_cpu=args.use_cpu,
            disable_tqdm=args.disable_tqdm,
            dataloader_num_workers=args.dataloader_num_workers,
            report_to=args.report_to,
            save_total_limit=1,
        ),
        train_dataset=trainer.lower_dataset,
        train_transform=trainer.lower_transform,
    )


def try_out(trainer: BiSSLTrainer, pretrainer: PretextTrainer) -> None:
    """Builds what training will build and sends a few images through both models, so that settings which do not fit
    come to light before it."""
    trainer.try_losses(rows=4)
    trainer.level_schedules()
    trainer.create_optimizer()
    trainer.get_train_dataloader()
    pretrainer.create_optimizer()


def pretrain(pretrainer: PretextTrainer, model: BiSSLModel) -> None:
    """Pre-trains the lower model, or takes over what an earlier start of this run has finished."""
    folder = Path(str(pretrainer.args.output_dir))
    finished = folder / "model"
    if pretrainer.args.max_steps > 0 and not finished.is_dir():
        checkpoint, _ = find_last_checkpoint(folder)
        print(f"Pre-training with SimCLR for {pretrainer.args.max_steps} steps")
        pretrainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if pretrainer.is_world_process_zero():
            model.lower.save_pretrained(folder / STAGING_FOLDER)
            publish(folder / STAGING_FOLDER, finished)
        pretrainer.accelerator.wait_for_everyone()
    if finished.is_dir():
        model.lower.load_state_dict(SimCLRForPreTraining.from_pretrained(finished).state_dict())
    model.start_upper_from_lower()


def evaluate_on_test(trainer: BiSSLTrainer, test: DecodedImages, prefix: str) -> dict[str, Any]:
    """The aligned model's metrics on the test split, and a layout of its features."""
    metrics = trainer.evaluate(test, metric_key_prefix=prefix)
    rows: Dataset = Subset(test, range(min(len(test), TSNE_ROWS)))
    features, labels = extract_features(trainer.aligned_model(), batches_of(trainer, rows))
    layout = tsne_layout(features, seed=trainer.args.seed) if len(features) >= 4 else np.zeros((len(features), 2))
    return {"metrics": metrics, "layout": layout.tolist(), "labels": labels.tolist()}


def batches_of(trainer: BiSSLTrainer, rows: Dataset) -> Iterator[dict[str, Any]]:
    key = StepKey(trainer.args.key_seed, int(Stream.EVALUATION), 0, 0, 0)
    for batch in trainer.get_test_dataloader(rows):
        yield trainer.move_and_transform(batch, key, trainer.eval_transform)


def write_outputs(
    trainer: BiSSLTrainer, before: dict[str, Any], after: dict[str, Any], class_names: list[str]
) -> None:
    output = Path(str(trainer.args.output_dir))
    trainer.model.export(
        output, processing_class=trainer.processing_class, recalibrate_on=list(trainer.recalibration_batches()) or None
    )
    trainer.model.save_pretrained(output / "bilevel")
    plot_run(trainer.state.log_history, output / "figures" / "training.png")
    layouts = [
        (
            f"{title}: accuracy {100 * stage['metrics'][f'{prefix}_accuracy']:.1f} %",
            np.array(stage["layout"]),
            stage["labels"],
        )
        for title, prefix, stage in (("Before BiSSL", "before", before), ("After BiSSL", "test", after))
    ]
    plot_layouts(
        [(title, points, np.array(labels)) for title, points, labels in layouts],
        class_names,
        output / "figures" / "tsne.png",
    )
    history = [row for row in trainer.state.log_history if "step" in row]
    write_json(output / RESULTS_NAME, {**before["metrics"], **after["metrics"], "log_history": history})


def print_summary(output: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    def row(name: str, metrics: dict[str, Any], prefix: str) -> dict[str, str]:
        return {
            "test split": name,
            "accuracy": f"{100 * metrics[f'{prefix}_accuracy']:.2f} %",
            "loss": f"{metrics[f'{prefix}_loss']:.4f}",
        }

    rows = [
        row("linear head on the pre-trained backbone", before["metrics"], "before"),
        row("aligned model, after BiSSL", after["metrics"], "test"),
    ]
    print(f"\n{format_table(rows)}\n")
    print(f"The aligned model lies in {output}, both levels in {output}/bilevel, figures in {output}/figures.")
    print("It is a plain transformers checkpoint, ready for fine-tuning:\n")
    print("    from transformers import AutoModelForImageClassification, pipeline")
    print(f'    model = AutoModelForImageClassification.from_pretrained("{output}")')
    print(f'    classify = pipeline("image-classification", model="{output}")\n')


def main(arguments: list[str] | None = None) -> None:
    data, models, args = parse_arguments(
        (DataArguments, ModelArguments, BiSSLTrainingArguments), arguments, description=str(__doc__).split("\n\n")[-1]
    )
    disable_progress_bar()  # of reading and writing weights, which takes a moment
    with refusing_bad_input():
        checkpoint = open_output_dir(args.output_dir, args.resume_from_checkpoint)
        set_seed(args.seed)
        images = load_images(data, args.seed)
        lower = build_lower(models)
        model = BiSSLModel.from_models(lower, build_upper(models, lower, images.class_names))
        trainer = build_trainer(data, args, model, images)
        pretrainer = build_pretrainer(models, args, trainer)
        if checkpoint:
            trainer.check_checkpoint(checkpoint)
        try_out(trainer, pretrainer)

    pretrain(pretrainer, model)
    output = Path(str(args.output_dir))
    before_file = output / "before.json"
    if checkpoint is None or not before_file.is_file():
        trainer.warm_up_head()
        before = evaluate_on_test(trainer, images.test, "before")
        if trainer.is_world_process_zero():
            write_json(before_file, before)
    else:
        before = json.loads(before_file.read_text())
    if checkpoint and (output / RESULTS_NAME).is_file():
        print("This run is finished already: unless num_alternations has grown, nothing is trained again.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = evaluate_on_test(trainer, images.test, "test")
    if trainer.is_world_process_zero():
        write_outputs(trainer, before, after, images.class_names)
        print_summary(output, before, after)


if __name__ == "__main__":
    main()
