"""Aligns a pre-trained backbone with a downstream task by BiSSL.

    accelerate launch recipes/bissl.py --config recipes/configs/digits.yaml [--any_field value]

Started from nothing it pre-trains with SimCLR first. Then it trains a head on the frozen backbone, solves the bilevel
problem, and writes an ordinary transformers checkpoint of the aligned model.
"""

import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from .. import BiSSLModel, BiSSLTrainer, BiSSLTrainingArguments
from ..cards.facts import ModelFacts
from ..checkpoints import write_mapping
from ..data.alternation import Stream
from ..data.balanced import sampled
from ..data.streams import Transform
from ..optim.optimizers import resolve_optimizer
from ..optim.pull import GOOD_PULL, TYPICAL_PULL
from ..tasks.downstream import DownstreamTask
from ..text import for_console
from ..trainer.divergence import check_metrics
from ..trainer.pretext_trainer import PretextTrainer
from ..trainer.training_args import PretextTrainingArguments
from .adapters import LoraArguments
from .aligned import AFTER_PREFIXES, BEFORE_PREFIXES, AlignedRun, evaluate_stage
from .arguments import given_fields, parse_arguments, refusing_bad_input
from .card import CardArguments, recipe_facts
from .console import prepare_console
from .images import DataArguments, ViewArguments, build_train_transform, build_view_transform, check_dataset
from .levels import Images, LowerDataArguments, build_upper, load_images
from .loss import LossArguments
from .models import PretextModelArguments, build_pretext_model
from .outputs import RUN_RESULTS, afterwards, kept_results, open_run
from .pairs import check_pairs
from .parts import SETTINGS_NAME, Stage
from .plan import MEASURED_ALTERNATIONS, format_plan, make_plan
from .pretraining import FINISHED_NAME, pretrain
from .running import as_a_run
from .starting import StartingPoint
from .views import PreviewArguments, write_preview
from .watching import WatchArguments, add_knn_check

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
class PlanArguments(PreviewArguments):
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
    loss: LossArguments,
) -> BiSSLTrainer:
    check_pairs(args)
    return BiSSLTrainer(
        model=model,
        args=args,
        train_dataset=sampled(images.train, loss.class_sampling),
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
            channels_last=args.channels_last,
            use_cpu=args.use_cpu,
            disable_tqdm=args.disable_tqdm,
            dataloader_num_workers=args.dataloader_num_workers,
            dataloader_timeout=args.dataloader_timeout,
            report_to=args.report_to,
            save_total_limit=1,
        ),
        train_dataset=trainer.lower_dataset,
        train_transform=trainer.streams.transform(Stream.LOWER),
    )


def keep_pretraining_settings(
    pretrainer: PretextTrainer,
    models: ModelArguments,
    views: ViewArguments,
    images: Images,
    preprocessing: str,
    loss: LossArguments,
) -> None:
    """Keeps what the pre-trained model and the head before BiSSL come from, and refuses to go on from those that come
    from something else."""
    args = pretrainer.args
    steps = {"pretrain_steps": args.max_steps, "pretrain_batch_size": args.per_device_train_batch_size}
    splits = {"lower": images.lower, "train": images.train, "test": images.test}
    data = {f"checksum of the {name} images": split.checksum() for name, split in splits.items()}
    settings = {**asdict(models), **steps, **data, "preprocessing": preprocessing, **asdict(views), **asdict(loss)}
    settings["seed"] = args.seed
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


def print_pull(trainer: BiSSLTrainer) -> None:
    """Says how far the upper level will reach the lower one; where that is too little the trainer warns."""
    pull = trainer.estimate_pull()
    if trainer.is_world_process_zero() and pull >= GOOD_PULL:
        print(
            for_console(
                f"Estimated pull of the upper level on the lower one: {pull:.2g} over the run, by a proximal_weight "
                f"of {trainer.proximal_weight:.2g}; {GOOD_PULL:g} to {TYPICAL_PULL:g} did well."
            )
        )


def evaluate_before(
    trainer: BiSSLTrainer, task: DownstreamTask, images: Images, pretraining_seconds: float, *, is_new: bool
) -> dict[str, Any]:
    """Trains the head and evaluates it, or returns what an earlier start has found."""
    file = Path(str(trainer.args.output_dir)) / BEFORE_NAME
    kept = None if is_new else kept_results(file, speaks=trainer.is_world_process_zero())
    if kept is not None:
        return kept
    start = time.perf_counter()
    trainer.warm_up_head()
    seconds = {"Pre-training": pretraining_seconds, "Head warm-up": time.perf_counter() - start}
    before = evaluate_stage(trainer, task, images, BEFORE_PREFIXES)
    before["seconds"] = {name: value for name, value in seconds.items() if value}
    if trainer.is_world_process_zero():
        write_mapping(file, before)
    return before


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
    crops = build_train_transform(preprocessing, views)
    task = DownstreamTask.from_images(images, preprocessing, crops, loss.weights())
    upper = build_upper(models.upper_model, lower, task)
    models.adapt(lower, upper)
    model = BiSSLModel.from_models(lower, upper)
    trainer = build_trainer(
        build_view_transform(preprocessing, views, models.pretext_task), args, model, images, task, loss
    )
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
    before = f"pre-trains with {models.pretext_task} for {steps:,} steps, " if steps else ""
    return (
        f"This command {before}trains a head on the frozen backbone, takes {args.num_alternations} alternations of "
        f"{args.lower_steps} lower and {args.upper_steps} upper steps, and writes the aligned model into "
        f"{args.output_dir}."
    )


def preview(
    data: DataArguments,
    lower_data: LowerDataArguments,
    views: ViewArguments,
    models: ModelArguments,
    args: BiSSLTrainingArguments,
) -> None:
    """Writes what the pretext task would see."""
    transform = build_view_transform(data.preprocessing, views, models.pretext_task)
    write_preview(load_images(data, lower_data, args.seed).lower, transform, str(args.output_dir), seed=args.seed)


def run_stages(
    trainer: BiSSLTrainer, pretrainer: PretextTrainer, task: DownstreamTask, images: Images, checkpoint: Path | None
) -> None:
    """Pre-trains, warms the head up, solves the bilevel problem, and writes what came of it."""
    if trainer.is_world_process_zero():
        print(for_console(task.describe_splits(images)))
    pretrain(pretrainer)
    trainer.model.start_upper_from_lower()
    before = evaluate_before(trainer, task, images, pretrainer.training_seconds, is_new=checkpoint is None)
    output = Path(str(trainer.args.output_dir))
    if checkpoint and (output / RUN_RESULTS).is_file() and trainer.is_world_process_zero():
        print("This run is finished already: unless num_alternations has grown, nothing is trained again.")
    if checkpoint is None:
        print_pull(trainer)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    after = evaluate_stage(trainer, task, images, AFTER_PREFIXES)
    check_metrics(after["metrics"], of="the aligned model")
    if trainer.is_world_process_zero():
        run = AlignedRun(trainer, task, images, before, after)
        run.write_outputs()
        with afterwards("The summary"):
            run.print_summary()
    trainer.push_outputs()


@as_a_run()
def main(arguments: list[str] | None = None) -> None:
    data, lower_data, views, models, loss, card, look_ahead, watch, args = parse_arguments(
        (
            DataArguments,
            LowerDataArguments,
            ViewArguments,
            ModelArguments,
            LossArguments,
            CardArguments,
            PlanArguments,
            WatchArguments,
            BiSSLTrainingArguments,
        ),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    prepare_console()
    with refusing_bad_input():
        check_dataset(data, describe_run(models, args))
        start = StartingPoint.find(models, "lower_model", "backbone", "upper_model")
        data = start.complete(data)
        given = given_fields(arguments)
        args = start.with_usual_optimizers(args, given, {"": "", "lower_": "lower_"})
        models = start.with_usual_optimizers(models, given, {"pretrain_": "lower_"})
        start.print_choices(data, args, models, to=args)
    if look_ahead.preview:
        with refusing_bad_input():
            preview(data, lower_data, views, models, args)
        return
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
        if watch.knn_every:
            add_knn_check(
                trainer,
                images,
                data.preprocessing,
                every=watch.knn_every,
                neighbors=watch.knn_neighbors,
                num_images=watch.knn_images,
                model=trainer.aligned_model,
            )
        trainer.publisher.resume_files = (
            BEFORE_NAME,
            *(f"{PRETRAINING_NAME}/{name}" for name in (FINISHED_NAME, SETTINGS_NAME)),
        )
        trainer.publisher.outputs_follow = True
        if checkpoint:
            trainer.check_checkpoint(checkpoint)
        keep_pretraining_settings(pretrainer, models, views, images, data.preprocessing.describe(), loss)
    run_stages(trainer, pretrainer, task, images, checkpoint)


if __name__ == "__main__":
    main()
