"""Fine-tunes an image classifier.

    accelerate launch recipes/finetune.py --config recipes/configs/digits_finetune.yaml [--any_field value]

The last stage of the pipeline. It starts from any image classifier, backbone, SimCLR model or output of
recipes/bissl.py, searches for learning rate and weight decay if asked to, trains with one or more seeds, and writes
the model that is best on the validation split. The test split is read once, at the end.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from ..tasks.labelled import decode_labelled
from ..text import for_console
from ..trainer.finetune_trainer import FineTuneTrainer
from ..trainer.resumable_args import with_changes
from ..trainer.search import SearchSpace, check_backend
from ..trainer.training_args import FineTuningArguments
from .adapters import LoraArguments
from .arguments import given_fields, parse_arguments, refusing_bad_input
from .card import CardArguments, recipe_facts
from .console import prepare_console
from .finetuned import FineTuned, seed_folder
from .finetuning import FineTuning
from .images import CropArguments, DataArguments, build_train_transform, check_dataset, load_labelled
from .loss import LossArguments
from .models import StartArguments, classifier_builder
from .outputs import afterwards, open_run
from .running import as_a_run
from .starting import StartingPoint


@dataclass
class FineTuneModelArguments(LoraArguments, StartArguments):
    """What fine-tuning starts from, and adapters."""


@dataclass
class RepetitionArguments:
    """How often to train, and what to search for."""

    seeds: int = field(
        default=1, metadata={"help": "Runs with different seeds, from --seed on; mean and deviation are reported."}
    )
    search_trials: int = field(
        default=0, metadata={"help": "Pairs of learning rate and weight decay to try first; 0 for no search."}
    )
    search_backend: str = field(
        default="optuna", metadata={"help": "optuna, in this process; or ray, over a Ray cluster."}
    )
    search_learning_rate: list[float] | None = field(
        default=None,
        metadata={"help": "Range of learning rates, drawn log-uniformly; 1e-4 to 1, for AdamW 1e-6 to 1e-3."},
    )
    search_weight_decay: list[float] | None = field(
        default=None,
        metadata={"help": "Range of weight decays, drawn log-uniformly; 1e-5 to 0.01, for AdamW 0.001 to 0.3."},
    )

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("search_trials", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        self.space("sgd")

    def space(self, optim: str) -> SearchSpace:
        """Returns the ranges to search with an optimizer: those that are given, and the usual ones.

        Raises:
            `ValueError`: for a range that is not allowed.
        """
        given: dict[str, Any] = {"learning_rate": self.search_learning_rate, "weight_decay": self.search_weight_decay}
        return replace(SearchSpace.usual(optim), **{name: tuple(pair) for name, pair in given.items() if pair})


def check_run(args: FineTuningArguments) -> None:
    """Refuses ways to go on and to push that fine-tuning does not have."""
    resume = str(args.resume_from_checkpoint or "").lower()
    if resume not in ("", "none", "false", "true"):
        raise ValueError(
            f"resume_from_checkpoint is {args.resume_from_checkpoint}; fine-tuning goes on from what its output_dir "
            "holds: pass true."
        )
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy is {HubStrategy(args.hub_strategy).value}; fine-tuning pushes the model that it has "
            "chosen, at its end: leave hub_strategy out."
        )


def build_finetuning(
    data: DataArguments,
    crops: CropArguments,
    start: FineTuneModelArguments,
    args: FineTuningArguments,
    loss: LossArguments,
) -> FineTuning:
    preprocessing = data.preprocessing
    train_transform = build_train_transform(preprocessing, crops)
    with args.main_process_first(desc="reading images"):  # the others find what it has downloaded and decoded
        splits = load_labelled(data, seed=args.seed)
        images = decode_labelled(
            splits, preprocessing.side, unreadable=data.unreadable, resample=preprocessing.resample
        )
    return FineTuning(
        args=with_changes(args, push_to_hub=False),  # what is pushed is the outcome of all runs
        images=images,
        build_model=classifier_builder(
            start,
            images.class_names,
            problem_type=images.problem_type,
            image_size=preprocessing.side,
            lora=start,
        ),
        train_transform=train_transform,
        preprocessing=preprocessing,
        settings={**asdict(data), **asdict(crops), **asdict(start), **asdict(loss)},
        class_weights=loss.weights(),
        class_sampling=loss.class_sampling,
    )


def run_stages(
    trainer: FineTuneTrainer, tuning: FineTuning, repetition: RepetitionArguments, output: Path, seeds: range
) -> None:
    """Searches where that was asked for, trains with each seed, tests, and writes what came of it."""
    if trainer.is_world_process_zero():
        print(for_console(tuning.task.describe_splits(tuning.images)))
    found, chosen = None, {}
    if repetition.search_trials:
        found = tuning.search(
            output / "search",
            repetition.space(str(tuning.args.optim)),
            num_trials=repetition.search_trials,
            backend=repetition.search_backend,
        )
        chosen = found.best
    runs = {}
    for seed in seeds:
        if trainer.is_world_process_zero():
            print(f"Fine-tuning with seed {seed}")
        runs[seed] = tuning.train(seed_folder(output, seed), seed=seed, **chosen)
    tests = {seed: tuning.test(seed_folder(output, seed)) for seed in runs}
    best = max(runs, key=lambda seed: tuning.rank(runs[seed]))
    predicted = {
        split: tuning.predict(seed_folder(output, best), getattr(tuning.images, split))
        for split in ("validation", "test")
    }
    if trainer.is_world_process_zero():
        outcome = FineTuned(trainer, tuning, runs, tests, best, predicted, found)
        outcome.write_outputs()
        with afterwards("The summary"):
            outcome.print_summary()
    trainer.push_outputs()


@as_a_run()
def main(arguments: list[str] | None = None) -> None:
    data, crops, start, loss, repetition, card, args = parse_arguments(
        (
            DataArguments,
            CropArguments,
            FineTuneModelArguments,
            LossArguments,
            RepetitionArguments,
            CardArguments,
            FineTuningArguments,
        ),
        arguments,
        description=str(__doc__).split("\n\n")[-1],
    )
    prepare_console()
    with refusing_bad_input():
        check_dataset(data, f"This command fine-tunes a classifier for {args.num_train_epochs:g} epochs.")
        check_run(args)
        point = StartingPoint.find(start, "model")
        data = point.complete(data)
        args = point.with_usual_optimizers(args, given_fields(arguments), {"": ""})
        point.print_choices(data, args, to=args)
        open_run(args, leaves=("seed-*", "search"))  # what it goes on from are the finished parts in there
        if repetition.search_trials:
            check_backend(repetition.search_backend, field="search_backend")
        tuning = build_finetuning(data, crops, start, args, loss)
        output, seeds = Path(args.output_dir), range(args.seed, args.seed + repetition.seeds)
        if repetition.search_trials:
            tuning.search_part(output / "search", repetition.space(str(args.optim)), begins=False)
        else:
            for seed in seeds:
                tuning.run_part(seed_folder(output, seed), seed=seed, begins=False)
        trainer = tuning.build_trainer(push_to_hub=args.push_to_hub)
        trainer.try_loss(rows=4)
        trainer.facts = recipe_facts(
            card,
            dataset=data.dataset,
            base_models=[start.model],
            settings={"Data": data, "Views": crops, "Model": start, "Loss": loss},
        )
    run_stages(trainer, tuning, repetition, output, seeds)


if __name__ == "__main__":
    main()
