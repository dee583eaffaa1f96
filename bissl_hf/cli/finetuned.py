"""What fine-tuning leaves: the best model, figures, results, card, report and summary."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PredictionOutput

from ..cards.tables import Evaluation, metrics_under
from ..checkpoints import write_json
from ..data.augment import image_processor
from ..evaluation.figures import plot_curves, plot_search
from ..models.saving import save_model
from ..report.page import interval_text, write_report
from ..report.record import Evaluated, Report
from ..text import for_console, for_terminal, format_table
from ..trainer.finetune_trainer import FineTuneTrainer
from ..trainer.search import SearchResult
from .finetuning import FineTuning, summarise
from .outputs import RUN_RESULTS, afterwards
from .reporting import data_lines, error_pictures, evaluated, prediction_lists, settings_of_facts


def seed_folder(output: Path, seed: int) -> Path:
    """Returns where the run of a seed is."""
    return output / f"seed-{seed}"


def curves_of(runs: Mapping[int, Mapping[str, Any]], metric: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Returns the runs' histories under names of their own, and what to draw of them."""
    history = [
        {"epoch": row["epoch"], **{f"{name} {seed}": value for name, value in row.items()}}
        for seed, run in runs.items()
        for row in run["log_history"]
    ]
    titles = {"loss": "Training loss", "eval_loss": "Validation loss", f"eval_{metric}": f"Validation {metric}"}
    panels = [(title, [(f"{name} {seed}", f"seed {seed}") for seed in runs]) for name, title in titles.items()]
    return history, panels


@dataclass
class FineTuned:
    """Finished runs, to be written and summed up by one process.

    Args:
        trainer ([`FineTuneTrainer`]): writes the card; it takes over the log of the best run, which another one
            has trained.
        tuning ([`FineTuning`])
        runs (`Mapping[int, Mapping]`): by seed what [`FineTuning.train`] has returned.
        tests (`Mapping[int, Mapping[str, float]]`): likewise [`FineTuning.test`].
        best (`int`): seed of the run that is best on the validation split.
        predicted (`Mapping[str, PredictionOutput]`): what its model predicts, by split.
        found ([`SearchResult`], *optional*)
    """

    trainer: FineTuneTrainer
    tuning: FineTuning
    runs: Mapping[int, Mapping[str, Any]]
    tests: Mapping[int, Mapping[str, float]]
    best: int
    predicted: Mapping[str, PredictionOutput]
    found: SearchResult | None = None

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(str(self.tuning.args.output_dir))

    def per_class(self) -> dict[str, float]:
        """Returns the score of the best model for each class on the test split."""
        test = self.predicted["test"]
        return self.tuning.task.per_class(test.predictions, test.label_ids)

    def outcomes(self) -> list[Evaluated]:
        """Returns the best model on the validation and on the test split."""
        metrics = {
            "validation": metrics_under(self.runs[self.best], "eval"),
            "test": metrics_under(self.tests[self.best], "test"),
        }
        return [
            evaluated(
                "fine-tuned",
                split,
                getattr(self.tuning.images, split),
                prediction_lists(self.tuning.task, predicted.predictions),
                metrics[split],
            )
            for split, predicted in self.predicted.items()
        ]

    def results(self) -> dict[str, Any]:
        """Returns what is kept of all runs."""
        args, metric, runs, tests = self.tuning.args, self.tuning.metric, self.runs, self.tests
        return {
            **{name: summarise([tests[seed][name] for seed in runs]) for name in tests[self.best]},
            f"eval_{metric}": summarise([run[f"eval_{metric}"] for run in runs.values()]),
            "test_per_class": self.per_class(),
            "seeds": list(runs),
            "best_seed": self.best,
            "learning_rate": self.found.best["learning_rate"] if self.found else args.learning_rate,
            "weight_decay": self.found.best["weight_decay"] if self.found else args.weight_decay,
            "search": self.found.trials if self.found else [],
            "train_seconds": [run["train_seconds"] for run in runs.values()],
        }

    def write_outputs(self) -> None:
        """Writes the best model and the results; then figures, card and report."""
        output, metric, tuning = self.output, self.tuning.metric, self.tuning
        save_model(tuning.load(seed_folder(output, self.best)), output, image_processor(tuning.image_size))
        write_json(output / RUN_RESULTS, self.results())
        with afterwards("The figure of the losses"):
            plot_curves(*curves_of(self.runs, metric), output / "figures" / "finetuning.png")
        if self.found is not None:
            with afterwards("The figure of the search"):
                plot_search(self.found.trials, self.found.best, f"eval_{metric}", output / "figures" / "search.png")
        with afterwards("The model card"):
            self.take_over_best_run()
            self.trainer.create_model_card()
        with afterwards("The report"):
            write_report(self.report(), output)

    def take_over_best_run(self) -> None:
        """Has the trainer know of the best run what its card and record say."""
        trainer, results, rows = self.trainer, self.results(), len(self.tuning.images.test)
        named = {"seed": "best_seed", "learning_rate": "learning_rate", "weight_decay": "weight_decay"}
        for name, source in named.items():
            setattr(trainer.args, name, results[source])
        trainer.state.log_history = history = self.runs[self.best]["log_history"]
        trainer.state.global_step = history[-1]["step"]
        test = self.tests[self.best]
        trainer.facts.evaluations = [Evaluation("This model", "test", metrics_under(test, "test"), rows)]
        if len(self.runs) > 1:
            means = metrics_under({name: results[name]["mean"] for name in test}, "test")
            mean_of = f"Mean over {len(self.runs)} seeds"
            trainer.facts.evaluations.append(Evaluation(mean_of, "test", means, rows, described=False))

    def report(self) -> Report:
        """Returns the report of the best run."""
        facts, output, found = self.trainer.facts, str(self.output), self.outcomes()
        images, task = self.tuning.images, self.tuning.task
        return Report(
            title=f"Fine-tuning on {facts.dataset}",
            run=self.trainer.record(),
            data=data_lines(str(facts.dataset), images),
            settings=settings_of_facts(facts),
            after=found,
            per_class=self.per_class(),
            class_names=task.class_names,
            conclusions=self.conclusions(),
            errors=error_pictures(found[-1], images.test, task.class_names),
            seconds={f"Training, seed {seed}": run["train_seconds"] for seed, run in self.runs.items()},
            folder=output,
            next_steps=[f"bissl-hf predict --model {output} --inputs path/to/images"],
        )

    def conclusions(self) -> list[str]:
        """Returns how the outcome came about and how sure it is, as sentences."""
        results, test = self.results(), self.outcomes()[-1]
        how = f", chosen among {len(results['search'])} pairs on the validation split" if self.found else ""
        sentences = [f"Learning rate {results['learning_rate']:.3g}, weight decay {results['weight_decay']:.3g}{how}."]
        if "accuracy" in test.metrics:
            sentences.append(
                f"On {test.examples:,} test images an accuracy of {100 * test.metrics['accuracy']:.2f} % has a 95 % "
                f"interval of {interval_text(test)}; how much it depends on the seed comes on top."
            )
        return sentences

    def print_summary(self) -> None:
        """Prints the metrics over all seeds, how sure they are, and how to go on."""
        output = for_terminal(self.output)
        print(f"\n{format_table(self._rows())}\n")
        for sentence in self.conclusions():
            print(for_console(sentence))
        which = f"The model of seed {self.best}, best on the validation split," if len(self.runs) > 1 else "The model"
        print(f"\n{which} is in {output},\na report with all figures in {output}/report.html.\n")
        print("    from transformers import pipeline")
        print(f'    classify = pipeline("image-classification", model="{output}")\n')

    def _rows(self) -> list[dict[str, str]]:
        sizes = {"validation": len(self.tuning.images.validation), "test": len(self.tuning.images.test)}
        rows = []
        for name, summary in self.results().items():
            if isinstance(summary, dict) and "mean" in summary:
                prefix, _, metric = name.partition("_")
                split = {"eval": "validation"}.get(prefix, prefix)
                factor, unit = (1, "") if metric in ("loss", "r2", "mae", "rmse") else (100, " %")
                row = {
                    "split": split,
                    "metric": {"map": "11-point mAP"}.get(metric, metric.replace("_", " ")),
                    "n": f"{sizes[split]:,}",
                    "mean" if len(self.runs) > 1 else "value": f"{factor * summary['mean']:.2f}{unit}",
                }
                if len(self.runs) > 1:
                    row["deviation"] = f"{factor * summary['std']:.2f}{unit}"
                    row["all values"] = ", ".join(f"{factor * v:.2f}" for v in summary["values"])
                rows.append(row)
        return rows
