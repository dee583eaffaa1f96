"""Trains the pretext task and a downstream task jointly on one backbone.

    accelerate launch recipes/joint.py --config recipes/configs/digits_joint.yaml [--any_field value]

The alternative to `align`: each step takes a batch of both tasks, and the loss is the pretext loss plus
`downstream_weight` times the downstream loss. It takes the data that `align` takes, starts from a pre-trained SimCLR
model or from a backbone, and writes an ordinary transformers checkpoint, which `finetune` takes as --model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from .. import BiSSLModel
from ..cards.tables import Evaluation, metrics_under
from ..checkpoints import write_json
from ..data.balanced import sampled
from ..evaluation.figures import plot_curves
from ..report.page import write_report
from ..report.record import Evaluated, Report
from ..tasks.downstream import DownstreamTask
from ..text import for_console, for_terminal
from ..trainer.divergence import check_metrics
from ..trainer.joint_trainer import JointTrainer
from ..trainer.training_args import JointTrainingArguments
from .adapters import LoraArguments
from .arguments import given_fields, parse_arguments, refusing_bad_input
from .card import CardArguments, recipe_facts
from .console import prepare_console
from .images import DataArguments, ViewArguments, build_train_transform, build_view_transform, check_dataset
from .levels import Images, LowerDataArguments, build_upper, load_images
from .loss import LossArguments
from .models import PretextModelArguments, build_pretext_model
from .outputs import RUN_RESULTS, afterwards, open_run
from .pairs import check_pairs
from .reporting import (
    data_lines,
    error_pictures,
    evaluated,
    format_outcomes,
    prediction_lists,
    sample_pictures,
    settings_of_facts,
)
from .running import as_a_run
from .starting import StartingPoint
from .views import PreviewArguments, write_preview


@dataclass
class JointModelArguments(LoraArguments, PretextModelArguments):
    """Where the models come from."""

    upper_model: str | None = field(default=None, metadata={"help": "Image classifier whose head is kept."})


def build_run(
    data: DataArguments,
    lower_data: LowerDataArguments,
    views: ViewArguments,
    models: JointModelArguments,
    args: JointTrainingArguments,
    loss: LossArguments,
) -> tuple[Images, DownstreamTask, JointTrainer]:
    """Loads data and models and builds the trainer."""
    set_seed(args.seed)
    check_pairs(args)
    preprocessing = data.preprocessing
    view_transform = build_view_transform(preprocessing, views, models.pretext_task)
    with args.main_process_first(desc="reading images"):  # the others find what it has downloaded and decoded
        images = load_images(data, lower_data, args.seed)
    crops = build_train_transform(preprocessing, views)
    task = DownstreamTask.from_images(images, preprocessing, crops, loss.weights())
    lower = build_pretext_model(models, preprocessing.side)
    upper = build_upper(models.upper_model, lower, task)
    models.adapt(lower, upper)
    trainer = JointTrainer(
        BiSSLModel.from_models(lower, upper),
        args,
        train_dataset=sampled(images.train, loss.class_sampling),
        lower_dataset=images.lower,
        eval_dataset=images.validation,
        lower_transform=view_transform,
        **task.trainer_arguments(),
    )
    return images, task, trainer


def evaluate(trainer: JointTrainer, task: DownstreamTask, images: Images) -> tuple[dict[str, Any], list[Evaluated]]:
    """Returns the metrics of the final model on validation (`eval_*`) and test images (`test_*`), and what it predicts
    for both."""
    metrics: dict[str, Any] = {}
    found = []
    for split, prefix in (("validation", "eval"), ("test", "test")):
        rows = getattr(images, split)
        metrics |= trainer.evaluate(rows, metric_key_prefix=prefix)
        predicted = trainer.predict(rows)
        predictions = prediction_lists(task, predicted.predictions)
        found.append(evaluated("joint training", split, rows, predictions, metrics_under(metrics, prefix)))
    metrics["test_per_class"] = task.per_class(predicted.predictions, predicted.label_ids)
    return metrics, found


def write_outputs(
    trainer: JointTrainer, task: DownstreamTask, images: Images, metrics: dict[str, Any], found: list[Evaluated]
) -> None:
    """Writes the native model and its results; then card, curves and report."""
    output = Path(str(trainer.args.output_dir))
    trainer.save_model(output)
    history = [row for row in trainer.state.log_history if "step" in row]
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
    with afterwards("The figure of the losses"):
        plot_curves(history, [("Joint loss", [("loss", "training")])], output / "figures" / "joint.png")
    with afterwards("The model card"):
        trainer.create_model_card()
    with afterwards("The report"):
        write_report(build_report(trainer, task, images, metrics["test_per_class"], found), output)


def build_report(
    trainer: JointTrainer,
    task: DownstreamTask,
    images: Images,
    per_class: dict[str, float],
    found: list[Evaluated],
) -> Report:
    """Returns the report of the run."""
    output, facts, clock = str(trainer.args.output_dir), trainer.facts, trainer.step_clock.seconds
    return Report(
        title=f"Joint training with {facts.dataset}",
        run=trainer.record(),
        data=data_lines(str(facts.dataset), images, (str(facts.lower_dataset), len(images.lower))),
        settings=settings_of_facts(facts),
        after=found,
        per_class=per_class,
        class_names=task.class_names,
        views=sample_pictures(trainer, images.lower),
        errors=error_pictures(found[-1], images.test, task.class_names),
        seconds={"Steps": clock["step"], "Evaluation and checkpoints": clock["between"]},
        folder=output,
        next_steps=[f"bissl-hf finetune --model {output} --dataset {facts.dataset}"],
    )


def print_summary(output: str, found: list[Evaluated]) -> None:
    """Prints the metrics on both held-out splits and how to go on."""
    output = for_terminal(output)
    print(f"\n{format_outcomes(found)}\n")
    print(f"The jointly trained model is in {output},\na report with all figures in {output}/report.html.")
    print("To go on with it:\n")
    print(f"    bissl-hf finetune --model {output} ...       fine-tunes it")
    print(f"    bissl-hf predict --model {output} --inputs FOLDER\n")


@as_a_run()
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    data, lower_data, views, models, loss, card, look_ahead, args = parse_arguments(
        (
            DataArguments,
            LowerDataArguments,
            ViewArguments,
            JointModelArguments,
            LossArguments,
            CardArguments,
            PreviewArguments,
            JointTrainingArguments,
        ),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    prepare_console()
    with refusing_bad_input():
        check_dataset(data, f"This command trains both tasks on one backbone for {args.num_train_epochs:g} epochs.")
        start = StartingPoint.find(models, "lower_model", "backbone", "upper_model")
        data = start.complete(data)
        if look_ahead.preview:
            transform = build_view_transform(data.preprocessing, views, models.pretext_task)
            images = load_images(data, lower_data, args.seed)
            write_preview(images.lower, transform, str(args.output_dir), seed=args.seed)
            return
        args = start.with_usual_optimizers(args, given_fields(arguments), {"": "lower_"})
        start.print_choices(data, args, to=args)
        checkpoint = open_run(args, leaves=("checkpoint-*",))
        images, task, trainer = build_run(data, lower_data, views, models, args, loss)
        trainer.facts = recipe_facts(
            card,
            dataset=data.dataset,
            lower_dataset=lower_data.lower_dataset or data.dataset,
            base_models=[*models.loaded_models(), models.upper_model],
            settings={"Data": data, "Views": views, "Models": models, "Loss": loss},
        )
        trainer.publisher.outputs_follow = True
        if checkpoint:
            trainer.check_checkpoint(checkpoint)
        trainer.try_loss(rows=4)

    if trainer.is_world_process_zero():
        print(for_console(task.describe_splits(images)))
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics, found = evaluate(trainer, task, images)
    check_metrics(metrics, of="the joint model")
    if trainer.is_world_process_zero():
        write_outputs(trainer, task, images, metrics, found)
        with afterwards("The summary"):
            print_summary(str(args.output_dir), found)
    trainer.push_outputs()


if __name__ == "__main__":
    main()
