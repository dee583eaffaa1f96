"""Aligns a pre-trained backbone with a downstream task by BiSSL.

    accelerate launch recipes/bissl.py --config recipes/configs/digits.yaml [--any_field value]

Started from nothing it pre-trains with SimCLR first. Then it trains a head on the frozen backbone, solves the bilevel
problem, and writes an ordinary transformers checkpoint of the aligned model.
"""

import json
import math
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import set_seed
from transformers.utils.logging import disable_progress_bar

from .. import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments
from ..cards.facts import ModelFacts
from ..cards.tables import Evaluation, metrics_under
from ..checkpoints import write_json
from ..data.alternation import Stream
from ..data.decoded import DecodedImages
from ..data.streams import Transform
from ..evaluation.features import extract_features, tsne_layout, with_one_class
from ..evaluation.figures import plot_layouts, plot_run
from ..optim.optimizers import resolve_optimizer
from ..text import format_table
from ..trainer.divergence import check_metrics
from ..trainer.pretext_trainer import PretextTrainer
from ..trainer.training_args import PretextTrainingArguments
from .adapters import LoraArguments
from .arguments import given_fields, parse_arguments, refusing_bad_input, stopping_at_divergence
from .card import CardArguments, recipe_facts
from .images import DataArguments, ViewArguments, build_view_transform, check_dataset
from .levels import Images, LowerDataArguments, build_upper, load_images
from .models import PretextModelArguments, build_pretext_model
from .outputs import RUN_RESULTS, afterwards, name_metrics, open_run
from .pairs import check_pairs
from .parts import SETTINGS_NAME, Stage
from .plan import MEASURED_ALTERNATIONS, format_plan, make_plan
from .pretraining import FINISHED_NAME, pretrain
from .starting import StartingPoint
from .tasks import DownstreamTask, LossArguments

TSNE_ROWS = 1000
BEFORE_NAME = "before.json"
PRETRAINING_NAME = "pretraining"


@dataclass
class ModelArguments(LoraArguments, PretextModelArguments):
    """Where the models come from, and the pre-training that precedes BiSSL."""

    upper_model: str | None = field(default=None, metadata={"help": "Image classifier whose head is kept."})
    pretrain_steps: int | None = field(
        default=None,
        metadata={"help": "Pretext steps before BiSSL; if not given 1000, or 0 with --lower_model or --lora_rank."},
    )
    pretrain_batch_size: int | None = field(
        default=None, metadata={"help": "Batch per device in pre-training; per_device_lower_batch_size if not given."}
    )
    pretrain_learning_rate: float = field(default=4.8, metadata={"help": "Learning rate of pre-training."})
    pretrain_weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay of pre-training."})
    pretrain_warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up; below 1 a fraction of the steps."})
    pretrain_optim: str = field(default="lars", metadata={"help": "Optimizer of pre-training."})


@dataclass
class PlanArguments:
    """A look ahead."""

    plan: bool = field(
        default=False,
        metadata={"help": "Measure two alternations, print what the whole run will take, and leave nothing behind."},
    )


def build_trainer(
    view_transform: Transform,
    args: BiSSLTrainingArguments,
    model: BiSSLModel,
    images: Images,
    task: DownstreamTask,
) -> BiSSLTrainer:
    check_pairs(args)
    return BiSSLTrainer(
        model=model,
        args=args,
        train_dataset=images.train,
        lower_dataset=images.lower,
        eval_dataset=images.validation,
        lower_transform=view_transform,
        **task.trainer_arguments(),
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


def num_pretrain_steps(arguments: ModelArguments) -> int:
    """The steps before BiSSL; by default none for a model that is pre-trained already."""
    if arguments.lora_rank is not None and arguments.pretrain_steps:
        raise ValueError(
            f"pretrain_steps is {arguments.pretrain_steps} and lora_rank is {arguments.lora_rank}; adapters go on a "
            "model that is pre-trained already: pre-train it with the command pretrain and pass it as --lower_model."
        )
    if arguments.pretrain_steps is not None:
        return arguments.pretrain_steps
    return 0 if arguments.lower_model or arguments.lora_rank is not None else 1000


def build_pretrainer(arguments: ModelArguments, args: BiSSLTrainingArguments, trainer: BiSSLTrainer) -> PretextTrainer:
    """The trainer of the stage before BiSSL; it trains the lower model in place."""
    steps, batch = num_pretrain_steps(arguments), arguments.pretrain_batch_size
    if batch is None:
        batch = args.per_device_lower_batch_size
    check_pretraining(arguments, steps, batch, len(trainer.lower_dataset) // args.world_size)
    return PretextTrainer(
        trainer.model.lower,
        PretextTrainingArguments(
            output_dir=str(Path(str(args.output_dir)) / PRETRAINING_NAME),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=arguments.pretrain_learning_rate,
            weight_decay=arguments.pretrain_weight_decay,
            warmup_steps=arguments.pretrain_warmup_steps,
            optim=arguments.pretrain_optim,
            seed=args.seed,
            data_seed=args.data_seed,
            bf16=args.bf16,
            fp16=args.fp16,
            use_cpu=args.use_cpu,
            disable_tqdm=args.disable_tqdm,
            dataloader_num_workers=args.dataloader_num_workers,
            report_to=args.report_to,
            save_total_limit=1,
        ),
        train_dataset=trainer.lower_dataset,
        train_transform=trainer.streams.transform(Stream.LOWER),
    )


def keep_pretraining_settings(pretrainer: PretextTrainer, models: ModelArguments) -> None:
    """Keeps what the pre-trained model comes from, and refuses to go on from one that comes from something else."""
    args = pretrainer.args
    steps = {"pretrain_steps": args.max_steps, "pretrain_batch_size": args.per_device_train_batch_size}
    settings = {**asdict(models), **steps, "seed": args.seed}
    del settings["upper_model"]
    Stage(str(args.output_dir), settings, writes=pretrainer.is_world_process_zero())


def try_out(trainer: BiSSLTrainer, pretrainer: PretextTrainer) -> None:
    """Builds what training will build and sends a few images through both models, so that wrong settings
    fail before it."""
    trainer.try_losses(rows=4)
    trainer.create_optimizer()
    trainer.get_train_dataloader()
    if pretrainer.args.max_steps > 0:
        pretrainer.try_loss(rows=4)


def tell_pull(trainer: BiSSLTrainer) -> None:
    """Says how far the upper level will reach the lower one; the trainer warns where that is next to nothing."""
    pull = trainer.estimate_pull()
    if trainer.is_world_process_zero() and not math.isnan(pull):
        print(
            f"Estimated pull of the upper level on the lower one: {pull:.2g} over the run; 3 to 10 did well in "
            "docs/results.md."
        )


def evaluate_on_test(trainer: BiSSLTrainer, task: DownstreamTask, test: DecodedImages, prefix: str) -> dict[str, Any]:
    """The aligned model's metrics on the test split, and a layout of its features."""
    metrics = trainer.evaluate(test, metric_key_prefix=prefix)
    predicted = trainer.predict(test)
    per_class = task.per_class(predicted.predictions, predicted.label_ids)
    rows: Dataset = Subset(test, range(min(len(test), TSNE_ROWS)))
    features, labels = with_one_class(*extract_features(trainer.aligned_model(), batches_of(trainer, rows)))
    layout = np.zeros((len(features), 2))
    if len(features) >= 4:
        with afterwards("The layout of the features"):
            layout = tsne_layout(features, seed=trainer.args.seed)
    return {"metrics": metrics, "per_class": per_class, "layout": layout.tolist(), "labels": labels.tolist()}


def batches_of(trainer: BiSSLTrainer, rows: Dataset) -> Iterator[dict[str, Any]]:
    key = trainer.streams.key(Stream.EVALUATION)._replace(rank=0)
    # Trainer's own loader would give each process a part of them.
    for batch in DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator):
        yield trainer.streams.prepare(batch, key)


def known_facts(
    card: CardArguments,
    data: DataArguments,
    lower_dataset: str | None,
    views: ViewArguments,
    models: ModelArguments,
    loss: LossArguments,
) -> ModelFacts:
    return recipe_facts(
        card,
        dataset=data.dataset,
        lower_dataset=lower_dataset or data.dataset,
        base_models=[*models.loaded_models(), models.upper_model],
        settings={"Data": data, "Views": views, "Models and pre-training": models, "Loss": loss},
    )


def write_outputs(
    trainer: BiSSLTrainer, before: dict[str, Any], after: dict[str, Any], test: DecodedImages, class_names: list[str]
) -> None:
    output = Path(str(trainer.args.output_dir))
    trainer.save_model(output)
    history = [row for row in trainer.state.log_history if "step" in row]
    per_class = {"before_per_class": before.get("per_class", {}), "test_per_class": after["per_class"]}
    write_json(output / RUN_RESULTS, {**before["metrics"], **after["metrics"], **per_class, "log_history": history})
    with afterwards("The figure of the losses"):
        plot_run(trainer.state.log_history, output / "figures" / "training.png")
    with afterwards("The figure of the features"):
        plot_features(before, after, class_names, output / "figures" / "tsne.png")
    head = metrics_under(before["metrics"], "before")
    trainer.facts.evaluations = [
        Evaluation("Linear head on the pre-trained backbone", "test", head, len(test), described=False),
        Evaluation("This model", "test", metrics_under(after["metrics"], "test"), len(test)),
    ]
    with afterwards("The model card"):
        trainer.create_model_card()


def plot_features(before: dict[str, Any], after: dict[str, Any], class_names: list[str], path: Path) -> None:
    """Draws the layouts of the test features before and after."""
    layouts = []
    for title, prefix, stage in (("Before BiSSL", "before", before), ("After BiSSL", "test", after)):
        figures = name_metrics(stage["metrics"], prefix)
        layouts.append(
            (f"{title}: {next(iter(figures))} {next(iter(figures.values()))}", stage["layout"], stage["labels"])
        )
    plot_layouts(
        [(title, np.reshape(points, (-1, 2)), np.array(labels)) for title, points, labels in layouts],
        class_names,
        path,
    )


def print_summary(output: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    def row(name: str, metrics: dict[str, Any], prefix: str) -> dict[str, str]:
        return {"test split": name, **name_metrics(metrics, prefix), "loss": f"{metrics[f'{prefix}_loss']:.4f}"}

    rows = [
        row("linear head on the pre-trained backbone", before["metrics"], "before"),
        row("aligned model, after BiSSL", after["metrics"], "test"),
    ]
    print(f"\n{format_table(rows)}\n")
    print(f"The aligned model is in {output}, both levels in {output}/bilevel, figures in {output}/figures.")
    print("It is a plain transformers checkpoint, ready for fine-tuning:\n")
    print("    from transformers import AutoModelForImageClassification, pipeline")
    print(f'    model = AutoModelForImageClassification.from_pretrained("{output}")')
    print(f'    classify = pipeline("image-classification", model="{output}")\n')
    print("How BiSSL compares with its rivals, measured over seeds: docs/results.md.")


def build_run(
    data: DataArguments,
    lower_data: LowerDataArguments,
    views: ViewArguments,
    models: ModelArguments,
    args: BiSSLTrainingArguments,
    loss: LossArguments,
) -> tuple[Images, DownstreamTask, BiSSLTrainer, PretextTrainer]:
    set_seed(args.seed)
    with args.main_process_first(desc="reading images"):  # the others find what it has downloaded and decoded
        images = load_images(data, lower_data, args.seed)
    preprocessing = data.preprocessing
    lower = build_pretext_model(models, preprocessing.side)
    task = DownstreamTask.from_images(images, preprocessing, views, loss.weights())
    upper = build_upper(models.upper_model, lower, task)
    models.adapt(lower, upper)
    model = BiSSLModel.from_models(lower, upper)
    trainer = build_trainer(build_view_transform(preprocessing, views, models.pretext), args, model, images, task)
    pretrainer = build_pretrainer(models, args, trainer)
    try_out(trainer, pretrainer)
    return images, task, trainer, pretrainer


def print_plan(trainer: BiSSLTrainer, pretrainer: PretextTrainer, images: Images) -> None:
    args = trainer.args
    print(f"Measuring {MEASURED_ALTERNATIONS} of {args.num_alternations} alternations", flush=True)
    parts, peak_bytes = make_plan(trainer, pretrainer, test_rows=len(images.test))
    if trainer.is_world_process_zero():
        print(f"\n{format_plan(parts, peak_bytes)}\nNothing of this is kept: start the run without --plan.")


def describe_run(models: ModelArguments, args: BiSSLTrainingArguments) -> str:
    """What the command would do with these arguments, as a sentence."""
    steps = num_pretrain_steps(models)
    before = f"pre-trains with {models.pretext} for {steps:,} steps, " if steps else ""
    return (
        f"This command {before}trains a head on the frozen backbone, takes {args.num_alternations} alternations of "
        f"{args.lower_steps} lower and {args.upper_steps} upper steps, and writes the aligned model into "
        f"{args.output_dir}."
    )


@stopping_at_divergence()
def main(arguments: list[str] | None = None) -> None:
    data, lower_data, views, models, loss, card, look_ahead, args = parse_arguments(
        (
            DataArguments,
            LowerDataArguments,
            ViewArguments,
            ModelArguments,
            LossArguments,
            CardArguments,
            PlanArguments,
            BiSSLTrainingArguments,
        ),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    disable_progress_bar()  # of reading and writing weights, which takes a moment
    with refusing_bad_input():
        check_dataset(data, describe_run(models, args))
        start = StartingPoint.find(models, "lower_model", "backbone", "upper_model")
        data = start.complete(data)
        given = given_fields(arguments)
        args = start.with_usual_optimizers(args, given, {"": "", "lower_": "lower_"})
        models = start.with_usual_optimizers(models, given, {"pretrain_": "lower_"})
        start.tell(data, args, models, to=args)
    if look_ahead.plan:
        with tempfile.TemporaryDirectory() as folder:
            args.output_dir, args.report_to, args.disable_tqdm, args.push_to_hub = folder, [], True, False
            with refusing_bad_input():
                images, _, trainer, pretrainer = build_run(data, lower_data, views, models, args, loss)
            print_plan(trainer, pretrainer, images)
        return
    with refusing_bad_input():
        checkpoint = open_run(args, leaves=("checkpoint-*", PRETRAINING_NAME))
        images, task, trainer, pretrainer = build_run(data, lower_data, views, models, args, loss)
        trainer.facts = known_facts(card, data, lower_data.lower_dataset, views, models, loss)
        trainer.publisher.resume_files = (
            BEFORE_NAME,
            *(f"{PRETRAINING_NAME}/{name}" for name in (FINISHED_NAME, SETTINGS_NAME)),
        )
        trainer.publisher.outputs_follow = True
        if checkpoint:
            trainer.check_checkpoint(checkpoint)
        keep_pretraining_settings(pretrainer, models)

    if trainer.is_world_process_zero():
        print(task.describe_splits(images))
    pretrain(pretrainer)
    trainer.model.start_upper_from_lower()
    output = Path(str(args.output_dir))
    before_file = output / BEFORE_NAME
    if checkpoint is None or not before_file.is_file():
        trainer.warm_up_head()
        before = evaluate_on_test(trainer, task, images.test, "before")
        if trainer.is_world_process_zero():
            write_json(before_file, before)
    else:
        before = json.loads(before_file.read_text())
    if checkpoint and (output / RUN_RESULTS).is_file() and trainer.is_world_process_zero():
        print("This run is finished already: unless num_alternations has grown, nothing is trained again.")
    if checkpoint is None:
        tell_pull(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = evaluate_on_test(trainer, task, images.test, "test")
    check_metrics(after["metrics"], of="the aligned model")
    if trainer.is_world_process_zero():
        write_outputs(trainer, before, after, images.test, images.class_names)
        with afterwards("The summary"):
            print_summary(output, before, after)
    trainer.push_outputs()


if __name__ == "__main__":
    main()
