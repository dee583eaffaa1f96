"""Fine-tunes an image classifier.

    accelerate launch recipes/finetune.py --config recipes/configs/digits_finetune.yaml [--any_field value]

The last stage of the pipeline. It starts from any image classifier, backbone, SimCLR model or output of
recipes/bissl.py, searches for learning rate and weight decay if asked to, trains with one or more seeds, and writes
the model that is best on the validation split. The test split is read once, at the end.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy
from transformers.utils.logging import disable_progress_bar

from ..cards.tables import Evaluation, metrics_under
from ..checkpoints import write_json
from ..data.augment import image_processor
from ..evaluation.figures import plot_curves, plot_search
from ..models.saving import save_model
from ..text import format_table
from ..trainer.finetune_trainer import FineTuneTrainer
from ..trainer.search import SearchResult, SearchSpace, check_backend
from ..trainer.training_args import FineTuningArguments, with_changes
from .adapters import LoraArguments
from .arguments import given_fields, parse_arguments, refusing_bad_input, stopping_at_divergence
from .card import CardArguments, recipe_facts
from .finetuning import FineTuning, summarise
from .images import CropArguments, DataArguments, build_train_transform, check_dataset, decode_labelled, load_labelled
from .models import StartArguments, classifier_builder
from .outputs import RUN_RESULTS, afterwards, open_run
from .starting import StartingPoint
from .tasks import LossArguments


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
    search_learning_rate: list[float] = field(
        default_factory=lambda: [1e-4, 1.0], metadata={"help": "Range of learning rates, drawn log-uniformly."}
    )
    search_weight_decay: list[float] = field(
        default_factory=lambda: [1e-5, 1e-2], metadata={"help": "Range of weight decays, drawn log-uniformly."}
    )

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("search_trials", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        self.space = SearchSpace(tuple(self.search_learning_rate), tuple(self.search_weight_decay))  # type: ignore[arg-type]


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
    )


def write_outputs(
    tuning: FineTuning,
    runs: dict[int, dict[str, Any]],
    tests: dict[int, dict[str, float]],
    found: SearchResult | None,
    per_class: dict[int, dict[str, float]],
) -> dict[str, Any]:
    """Writes the best model, figures and results; returns the results."""
    output, metric = Path(str(tuning.args.output_dir)), tuning.metric
    best = max(runs, key=lambda seed: tuning.rank(runs[seed]))
    save_model(
        tuning.load(seed_folder(output, best)),
        output,
        image_processor(tuning.preprocessing.side, **tuning.preprocessing.options),
    )
    results = {
        **{name: summarise([tests[seed][name] for seed in runs]) for name in tests[best]},
        f"eval_{metric}": summarise([run[f"eval_{metric}"] for run in runs.values()]),
        "test_per_class": per_class[best],
        "seeds": list(runs),
        "best_seed": best,
        "learning_rate": found.best["learning_rate"] if found else tuning.args.learning_rate,
        "weight_decay": found.best["weight_decay"] if found else tuning.args.weight_decay,
        "search": found.trials if found else [],
        "train_seconds": [run["train_seconds"] for run in runs.values()],
    }
    write_json(output / RUN_RESULTS, results)
    with afterwards("The figure of the losses"):
        plot_curves(*curves_of(runs, metric), output / "figures" / "finetuning.png")
    if found is not None:
        with afterwards("The figure of the search"):
            plot_search(found.trials, found.best, f"eval_{metric}", output / "figures" / "search.png")
    return results


def write_card(
    trainer: FineTuneTrainer, results: dict[str, Any], best: dict[str, Any], test: dict[str, float], rows: int
) -> None:
    """Writes the card of the best model, which another trainer has trained: this one takes over its log."""
    for name, source in (("seed", "best_seed"), ("learning_rate", "learning_rate"), ("weight_decay", "weight_decay")):
        setattr(trainer.args, name, results[source])
    trainer.state.log_history = best["log_history"]
    trainer.state.global_step = best["log_history"][-1]["step"]
    trainer.facts.evaluations = [Evaluation("This model", "test", metrics_under(test, "test"), rows)]
    if len(results["seeds"]) > 1:
        means = {name: results[name]["mean"] for name in test}
        mean_of = f"Mean over {len(results['seeds'])} seeds"
        trainer.facts.evaluations.append(
            Evaluation(mean_of, "test", metrics_under(means, "test"), rows, described=False)
        )
    trainer.create_model_card()


def curves_of(runs: dict[int, dict[str, Any]], metric: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """The runs' histories under names of their own, and what to draw of them."""
    history = [
        {"epoch": row["epoch"], **{f"{name} {seed}": value for name, value in row.items()}}
        for seed, run in runs.items()
        for row in run["log_history"]
    ]
    titles = {"loss": "Training loss", "eval_loss": "Validation loss", f"eval_{metric}": f"Validation {metric}"}
    panels = [(title, [(f"{name} {seed}", f"seed {seed}") for seed in runs]) for name, title in titles.items()]
    return history, panels


def seed_folder(output: Path, seed: int) -> Path:
    return output / f"seed-{seed}"


def print_summary(tuning: FineTuning, results: dict[str, Any]) -> None:
    output, rows = tuning.args.output_dir, []
    for name, summary in results.items():
        if isinstance(summary, dict) and "mean" in summary:
            split, _, metric = name.partition("_")
            factor, unit = (1, "") if metric == "loss" else (100, " %")
            deviation = "" if summary["std"] is None else f"{factor * summary['std']:.2f}{unit}"
            rows.append(
                {
                    "split": {"eval": "validation"}.get(split, split),
                    "metric": {"map": "11-point mAP"}.get(metric, metric.replace("_", " ")),
                    "mean": f"{factor * summary['mean']:.2f}{unit}",
                    **({"deviation": deviation} if deviation else {}),
                    **({"all values": ", ".join(f"{factor * v:.2f}" for v in summary["values"])} if deviation else {}),
                }
            )
    print(f"\n{format_table(rows)}\n")
    how = f"chosen among {len(results['search'])} pairs on the validation split" if results["search"] else "as given"
    print(f"Learning rate {results['learning_rate']:.3g}, weight decay {results['weight_decay']:.3g} ({how}).")
    print(f"The model of seed {results['best_seed']}, best on the validation split, is in {output}:\n")
    print("    from transformers import pipeline")
    print(f'    classify = pipeline("image-classification", model="{output}")\n')


@stopping_at_divergence()
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
    disable_progress_bar()  # of reading and writing weights, which takes a moment
    with refusing_bad_input():
        check_dataset(data, f"This command fine-tunes a classifier for {args.num_train_epochs:g} epochs.")
        check_run(args)
        point = StartingPoint.find(start, "model")
        data = point.complete(data)
        args = point.with_usual_optimizers(args, given_fields(arguments), {"": ""})
        point.tell(data, args, to=args)
        open_run(args, leaves=("seed-*", "search"))  # what it goes on from are the finished parts in there
        if repetition.search_trials:
            check_backend(repetition.search_backend, field="search_backend")
        tuning = build_finetuning(data, crops, start, args, loss)
        output, seeds = Path(args.output_dir), range(args.seed, args.seed + repetition.seeds)
        if repetition.search_trials:
            tuning.search_part(output / "search", repetition.space, begins=False)
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

    if trainer.is_world_process_zero():
        print(tuning.task.describe_splits(tuning.images))
    found, chosen = None, {}
    if repetition.search_trials:
        found = tuning.search(
            output / "search",
            repetition.space,
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
    per_class = {seed: tuning.test_per_class(seed_folder(output, seed)) for seed in runs}
    if trainer.is_world_process_zero():
        results = write_outputs(tuning, runs, tests, found, per_class)
        best = results["best_seed"]
        with afterwards("The model card"):
            write_card(trainer, results, runs[best], tests[best], len(tuning.images.test))
        with afterwards("The summary"):
            print_summary(tuning, results)
    trainer.push_outputs()


if __name__ == "__main__":
    main()
