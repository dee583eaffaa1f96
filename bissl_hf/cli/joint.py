"""Trains the pretext task and a downstream task jointly on one backbone.

    accelerate launch recipes/joint.py --config recipes/configs/digits_joint.yaml [--any_field value]

The alternative to `align`: each step takes a batch of both tasks, and the loss is the pretext loss plus
`downstream_weight` times the downstream loss. It takes the data that `align` takes, starts from a pre-trained SimCLR
model or from a backbone, and writes an ordinary transformers checkpoint, which `finetune` takes as --model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from .. import BiSSLModel
from ..cards.tables import Evaluation, metrics_under
from ..checkpoints import write_json
from ..data.alternation import Stream
from ..data.augment import TwoViewTransform
from ..evaluation.figures import plot_curves
from ..models.batch_norm import recalibrate_batch_norm
from ..models.saving import save_model
from ..report.page import write_report
from ..report.record import Report
from ..text import for_console
from ..trainer.joint_trainer import JointTrainer
from ..trainer.training_args import JointTrainingArguments
from .arguments import parse_arguments, refusing_bad_input
from .card import CardArguments, recipe_facts
from .images import DataArguments, ViewArguments, build_view_transform, check_dataset
from .levels import Images, LowerDataArguments, build_upper, load_images
from .loading import check_sources
from .models import PretextModelArguments, build_pretext_model
from .outputs import RUN_RESULTS, format_table, name_metrics, open_run
from .pairs import check_pairs
from .reporting import data_lines, error_pictures, evaluated, prediction_lists, settings_of_facts
from .tasks import DownstreamTask
from .views import PreviewArguments, sample_views, view_pictures, write_preview


@dataclass
class JointModelArguments(PretextModelArguments):
    """Where the models come from."""

    upper_model: str | None = field(default=None, metadata={"help": "Image classifier whose head is kept."})
    bn_recalibration_images: int = field(
        default=1024,
        metadata={
            "help": "Training images for the batch-norm statistics of the exported model; 0 for those of the views."
        },
    )

    def __post_init__(self) -> None:
        if self.bn_recalibration_images < 0:
            raise ValueError(f"bn_recalibration_images is {self.bn_recalibration_images}; it must be at least 0.")


def build_run(
    data: DataArguments,
    lower_data: LowerDataArguments,
    views: ViewArguments,
    models: JointModelArguments,
    args: JointTrainingArguments,
) -> tuple[Images, DownstreamTask, JointTrainer]:
    """Loads data and models and builds the trainer."""
    set_seed(args.seed)
    check_pairs(args)
    check_sources(models, "lower_model", "backbone", "upper_model")
    view_transform = build_view_transform(data.image_size, views)
    with args.main_process_first(desc="reading images"):  # the others find what it has downloaded and decoded
        images = load_images(data, lower_data, args.seed)
    task = DownstreamTask.from_images(images, data.image_size, views)
    args.remove_unused_columns = False  # forward of the model of both levels names none
    lower = build_pretext_model(models)
    trainer = JointTrainer(
        BiSSLModel.from_models(lower, build_upper(models.upper_model, lower, task)),
        args,
        train_dataset=images.train,
        lower_dataset=images.lower,
        eval_dataset=images.validation,
        lower_transform=view_transform,
        **task.trainer_arguments(),
    )
    trainer.label_names = ["labels"]  # which Trainer finds in a forward that names them
    return images, task, trainer


def trained_model(trainer: JointTrainer, images: Images, num_images: int) -> PreTrainedModel:
    """Returns the native classifier, the shared backbone with the downstream head, with batch-norm statistics
    estimated on `num_images` training images."""
    model: Any = trainer.model.aligned_model()
    model.to(trainer.args.device)
    if num_images:
        recalibrate_batch_norm(model, _training_batches(trainer, images, num_images))
    return model.eval()


def _training_batches(trainer: JointTrainer, images: Images, num_images: int) -> Iterator[dict[str, Any]]:
    rows = np.random.default_rng(trainer.args.key_seed).permutation(len(images.train))[:num_images]
    key = trainer.streams.key(Stream.EVALUATION)._replace(rank=0)
    loader = DataLoader(
        Subset(images.train, rows.tolist()), trainer.args.per_device_eval_batch_size, collate_fn=default_data_collator
    )
    for batch in loader:
        yield trainer.streams.prepare(batch, key)


def evaluate(
    trainer: JointTrainer, task: DownstreamTask, model: PreTrainedModel, images: Images
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Returns the metrics of the native model on validation (`eval_*`) and test images (`test_*`), and what it
    predicts for the latter."""
    with trainer.evaluating(model):
        found = trainer.evaluate(images.validation)
        found |= trainer.evaluate(images.test, metric_key_prefix="test")
        predicted = trainer.predict(images.test)
    per_class = task.per_class(predicted.predictions, predicted.label_ids)
    return {**found, "test_per_class": per_class}, prediction_lists(task, predicted.predictions)


def write_outputs(trainer: JointTrainer, model: PreTrainedModel, metrics: dict[str, Any], images: Images) -> None:
    """Writes the native model, its card, results and curves."""
    output = Path(str(trainer.args.output_dir))
    save_model(model, output, trainer.processing_class)
    history = [row for row in trainer.state.log_history if "step" in row]
    plot_curves(history, [("Joint loss", [("loss", "training")])], output / "figures" / "joint.png")
    write_json(
        output / RUN_RESULTS,
        {
            **metrics,
            "train_steps": trainer.state.global_step,
            "train_seconds": trainer.training_seconds,
            "log_history": history,
        },
    )
    trainer.facts.evaluations = [Evaluation("This model", "test", metrics_under(metrics, "test"), len(images.test))]
    trainer.model = model  # type: ignore[assignment]  # the card describes what has been written
    trainer.create_model_card()


def write_joint_report(
    trainer: JointTrainer,
    task: DownstreamTask,
    images: Images,
    metrics: dict[str, Any],
    predictions: dict[str, list[Any]],
    views: TwoViewTransform,
) -> None:
    """Writes the report of the run."""
    output, facts, clock = str(trainer.args.output_dir), trainer.facts, trainer.step_clock.seconds
    after = evaluated("jointly trained", "test", images.test, predictions, metrics_under(metrics, "test"))
    report = Report(
        title=f"Joint training with {facts.dataset}",
        run=trainer.record(),
        data=data_lines(str(facts.dataset), images, (str(facts.lower_dataset), len(images.lower))),
        settings=settings_of_facts(facts),
        after=[after],
        per_class=metrics["test_per_class"],
        class_names=task.class_names,
        views=view_pictures(sample_views(images.lower, views, seed=trainer.args.seed)),
        errors=error_pictures(after, images.test, task.class_names),
        seconds={"Steps": clock["step"], "Evaluation and checkpoints": clock["between"]},
        folder=output,
        next_steps=[f"bissl-hf finetune --model {output} --dataset {facts.dataset}"],
    )
    write_report(report, Path(output))


def print_summary(output: str, metrics: dict[str, Any]) -> None:
    """Prints the metrics on both held-out splits and how to go on."""
    rows = [
        {"split": name, **name_metrics(metrics, prefix), "loss": f"{metrics[f'{prefix}_loss']:.4f}"}
        for name, prefix in (("validation", "eval"), ("test", "test"))
    ]
    print(f"\n{format_table(rows)}\n")
    print(f"The jointly trained model is in {output}, its curve in {output}/figures. To go on with it:\n")
    print(f"    bissl-hf finetune --model {output} ...       fine-tunes it")
    print(f"    bissl-hf predict --model {output} --inputs FOLDER\n")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    data, lower_data, views, models, card, look_ahead, args = parse_arguments(
        (
            DataArguments,
            LowerDataArguments,
            ViewArguments,
            JointModelArguments,
            CardArguments,
            PreviewArguments,
            JointTrainingArguments,
        ),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    disable_progress_bar()  # of reading and writing weights, which takes a moment
    with refusing_bad_input():
        check_dataset(data, f"This command trains both tasks on one backbone for {args.num_train_epochs:g} epochs.")
        if look_ahead.preview:
            transform = build_view_transform(data.image_size, views)
            images = load_images(data, lower_data, args.seed)
            write_preview(images.lower, transform, str(args.output_dir), seed=args.seed)
            return
        checkpoint = open_run(args, leaves=("checkpoint-*",))
        images, task, trainer = build_run(data, lower_data, views, models, args)
        trainer.facts = recipe_facts(
            card,
            dataset=data.dataset,
            lower_dataset=lower_data.lower_dataset or data.dataset,
            base_models=[*models.loaded_models(), models.upper_model],
            settings={"Data": data, "Views": views, "Models": models},
        )
        trainer.publisher.outputs_follow = True
        if checkpoint:
            trainer.check_checkpoint(checkpoint)
        trainer.try_loss(rows=4)

    if trainer.is_world_process_zero():
        print(for_console(task.describe_splits(images)))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model = trained_model(trainer, images, models.bn_recalibration_images)
    metrics, predictions = evaluate(trainer, task, model, images)
    if trainer.is_world_process_zero():
        write_outputs(trainer, model, metrics, images)
        write_joint_report(trainer, task, images, metrics, predictions, build_view_transform(data.image_size, views))
        print_summary(str(args.output_dir), metrics)
    trainer.push_outputs()


if __name__ == "__main__":
    main()
