"""Pre-trains a backbone with SimCLR on images without labels.

    accelerate launch recipes/pretrain.py --config recipes/configs/digits_pretrain.yaml [--any_field value]

The first stage of the pipeline. It writes a SimCLR checkpoint, which recipes/bissl.py takes as --lower_model and
recipes/finetune.py as --model, and can watch on labelled images how good the features become.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from .. import load_image_dataset
from ..checkpoints import write_json
from ..data.augment import image_processor
from ..data.decoded import DecodedImages
from ..evaluation.figures import plot_curves
from ..report.page import write_report
from ..report.record import Report
from ..tasks.labelled import LabelledImages, decode_labelled, decode_unlabelled
from ..text import for_terminal, format_table
from ..trainer.pretext_trainer import PretextTrainer
from ..trainer.training_args import PretextTrainingArguments
from .arguments import given_fields, parse_arguments, refusing_bad_input
from .card import CardArguments, recipe_facts
from .console import prepare_console
from .images import DataArguments, ViewArguments, build_view_transform, check_dataset, load_labelled
from .models import PretextModelArguments, build_pretext_model
from .outputs import RUN_RESULTS, afterwards, open_run
from .pairs import check_pairs
from .reporting import sample_pictures, settings_of_facts
from .running import as_a_run
from .starting import StartingPoint
from .views import PreviewArguments, write_preview
from .watching import add_knn_check


@dataclass
class PretextDataArguments(DataArguments):
    """What the backbone learns from, and on what it is watched."""

    dataset: str = field(
        default="",
        metadata={
            "help": "Images to learn from, by name, folder, Parquet file or Hub id: the `unlabeled` split where there "
            "is one, else the training images. Labels are not used."
        },
    )
    knn_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Labelled images for a running check of the features: training images find the classes of "
            "validation images as their nearest neighbours. Columns as in --dataset. No check if not given."
        },
    )
    knn_every: int = field(default=10, metadata={"help": "Epochs between two checks."})
    knn_neighbors: int = field(default=20, metadata={"help": "Neighbours that vote."})
    knn_images: int = field(default=5000, metadata={"help": "Training images among which neighbours are looked for."})


def load_knn_images(data: PretextDataArguments, seed: int) -> LabelledImages | None:
    """The images of the running check."""
    if data.knn_dataset is None:
        return None
    for name in ("knn_every", "knn_neighbors", "knn_images"):
        if getattr(data, name) < 1:
            raise ValueError(f"{name} is {getattr(data, name)}; it must be at least 1.")
    labelled = DataArguments(
        dataset=data.knn_dataset,
        image_column=data.image_column,
        label_column=data.label_column,
    )
    images = decode_labelled(
        load_labelled(labelled, seed=seed),
        data.preprocessing.side,
        unreadable=data.unreadable,
        resample=data.preprocessing.resample,
    )
    if images.train.labels is not None and images.train.labels.ndim > 1:
        raise ValueError(f"knn_dataset {data.knn_dataset} has several labels per image; the check needs one.")
    return images


def load_pretext_images(data: PretextDataArguments, seed: int) -> DecodedImages:
    """The images to learn from."""
    splits = load_image_dataset(
        data.dataset,
        image_column=data.image_column,
        label_column=data.label_column,
        seed=seed,
        revision=data.dataset_revision,
        dataset_config=data.dataset_config,
        require_labels=False,
    )
    return decode_unlabelled(
        splits, data.preprocessing.side, unreadable=data.unreadable, resample=data.preprocessing.resample
    )


def build_trainer(
    data: PretextDataArguments, views: ViewArguments, models: PretextModelArguments, args: PretextTrainingArguments
) -> PretextTrainer:
    check_pairs(args)
    if data.train_examples is not None:
        raise ValueError(
            f"train_examples is {data.train_examples}, but pre-training uses no labels and all images; leave it out."
        )
    preprocessing = data.preprocessing
    view_transform = build_view_transform(preprocessing, views, models.pretext_task)
    with args.main_process_first(desc="reading images"):  # the others find what it has downloaded and decoded
        images = load_pretext_images(data, args.seed)
    return PretextTrainer(
        build_pretext_model(models, preprocessing.side),
        args,
        train_dataset=images,
        train_transform=view_transform,
        processing_class=image_processor(preprocessing.side, **preprocessing.options),
    )


def write_outputs(trainer: PretextTrainer) -> None:
    output = Path(str(trainer.args.output_dir))
    trainer.save_model(output)
    history = [row for row in trainer.state.log_history if "step" in row]
    panels = [("Pretext loss", [("loss", "training")]), ("kNN accuracy", [("knn_accuracy", "validation")])]
    write_json(
        output / RUN_RESULTS,
        {
            "train_loss": last(history, "loss"),
            "knn_accuracy": last(history, "knn_accuracy"),
            "train_steps": trainer.state.global_step,
            "train_seconds": trainer.training_seconds,
            "log_history": history,
        },
    )
    with afterwards("The figure of the losses"):
        plot_curves(history, panels, output / "figures" / "pretraining.png")
    with afterwards("The model card"):
        trainer.create_model_card()
    with afterwards("The report"):
        write_report(build_report(trainer), output)


def build_report(trainer: PretextTrainer) -> Report:
    """Returns the report of the run."""
    output, facts, images = str(trainer.args.output_dir), trainer.facts, trainer.train_dataset
    clock = trainer.step_clock.seconds
    return Report(
        title=f"Pre-training on {facts.dataset}",
        run=trainer.record(),
        data={"Images": f"{facts.dataset}: {len(images):,}"},
        settings=settings_of_facts(facts),
        views=sample_pictures(trainer, images),
        seconds={"Steps": clock["step"], "Checks and checkpoints": clock["between"]},
        folder=output,
        next_steps=[f"bissl-hf align --lower_model {output} --dataset path/to/labelled"],
    )


def last(history: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(history) if name in row), None)


def print_summary(trainer: PretextTrainer) -> None:
    rows = []
    for name, title, form in (("loss", "pretext loss", "{:.4f}"), ("knn_accuracy", "kNN accuracy", "{:.2%}")):
        values = [row[name] for row in trainer.state.log_history if name in row]
        if values:
            rows.append({"": title, "first": form.format(values[0]), "last": form.format(values[-1])})
    output = for_terminal(trainer.args.output_dir)
    print(f"\n{format_table(rows)}\n")
    print(f"The pretext model is in {output},\na report with all figures in {output}/report.html. To go on with it:\n")
    print(f"    bissl-hf align --lower_model {output} ...    aligns it with a downstream task")
    print(f"    bissl-hf finetune --model {output} ...       fine-tunes it\n")


@as_a_run()
def main(arguments: list[str] | None = None) -> None:
    data, views, models, card, look_ahead, args = parse_arguments(
        (
            PretextDataArguments,
            ViewArguments,
            PretextModelArguments,
            CardArguments,
            PreviewArguments,
            PretextTrainingArguments,
        ),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    prepare_console()
    with refusing_bad_input():
        task, epochs = models.pretext_task, args.num_train_epochs
        check_dataset(data, f"This command pre-trains with {task} for {epochs:g} epochs.")
        start = StartingPoint.find(models, "lower_model", "backbone")
        data = start.complete(data)
        if look_ahead.preview:
            transform = build_view_transform(data.preprocessing, views, models.pretext_task)
            write_preview(load_pretext_images(data, args.seed), transform, str(args.output_dir), seed=args.seed)
            return
        args = start.with_usual_optimizers(args, given_fields(arguments), {"": "lower_"})
        start.print_choices(data, args, to=args)
        checkpoint = open_run(args, leaves=("checkpoint-*",))
        set_seed(args.seed)
        trainer = build_trainer(data, views, models, args)
        trainer.facts = recipe_facts(
            card,
            dataset=data.dataset,
            base_models=models.loaded_models(),
            settings={"Data": data, "Views": views, "Model": models},
        )
        trainer.publisher.outputs_follow = True
        with args.main_process_first(desc="reading labelled images"):
            knn_images = load_knn_images(data, args.seed)
        if knn_images is not None:
            add_knn_check(
                trainer,
                knn_images,
                data.preprocessing,
                every=data.knn_every,
                neighbors=data.knn_neighbors,
                num_images=data.knn_images,
            )
        if checkpoint:
            trainer.check_checkpoint(checkpoint)
        trainer.try_loss(rows=4)

    if checkpoint and (Path(args.output_dir) / RUN_RESULTS).is_file() and trainer.is_world_process_zero():
        print("This run is finished already: unless it has become longer, nothing is trained again.")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.is_world_process_zero():
        write_outputs(trainer)
        with afterwards("The summary"):
            print_summary(trainer)
    trainer.push_outputs()


if __name__ == "__main__":
    main()
