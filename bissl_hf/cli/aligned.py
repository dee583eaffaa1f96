"""What an alignment leaves: evaluations before and after, figures, results, card, report and summary."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from ..cards.tables import Evaluation, evaluations_of_levels, metrics_under
from ..checkpoints import write_json
from ..data.alternation import Stream
from ..evaluation.features import extract_features, tsne_layout, with_one_class
from ..evaluation.figures import plot_layouts, plot_run
from ..report.page import write_report
from ..report.pictures import file_uri
from ..report.reading import explain_difference, explain_end, judge_difference
from ..report.record import Evaluated, Report
from ..tasks.downstream import DownstreamTask
from ..text import for_console, for_terminal
from ..trainer.bissl_trainer import BiSSLTrainer
from .levels import Images
from .outputs import RUN_RESULTS, afterwards, name_metrics
from .reporting import (
    data_lines,
    difference,
    error_pictures,
    evaluated,
    format_outcomes,
    prediction_lists,
    sample_pictures,
    settings_of_facts,
)

TSNE_ROWS = 1000
BEFORE, AFTER, UPPER = "before: linear head", "after: aligned", "after: upper level"
# Prefixes of the metrics on the test and on the validation split.
BEFORE_PREFIXES, AFTER_PREFIXES = ("before", "before_validation"), ("test", "validation")
_PARTS = {"lower": "Lower steps", "upper": "Upper steps", "between": "Evaluation and checkpoints"}


def evaluate_stage(
    trainer: BiSSLTrainer, task: DownstreamTask, images: Images, prefixes: tuple[str, str]
) -> dict[str, Any]:
    """Returns the metrics of the aligned and of the upper model on both held-out splits, what the aligned model
    predicts for them, and a layout of its features.

    Args:
        trainer ([`BiSSLTrainer`])
        task ([`DownstreamTask`])
        images ([`Images`])
        prefixes (`tuple[str, str]`): of the metrics on the test and on the validation split.
    """
    splits = {"test": images.test, "validation": images.validation}
    metrics: dict[str, float] = {}
    for prefix, rows in zip(prefixes, splits.values(), strict=True):
        metrics |= trainer.evaluate(rows, metric_key_prefix=prefix)
    predicted = {split: trainer.predict(rows) for split, rows in splits.items()}
    shown: Dataset = Subset(images.test, range(min(len(images.test), TSNE_ROWS)))
    features, labels = with_one_class(*extract_features(trainer.aligned_model(), batches_of(trainer, shown)))
    layout = np.zeros((len(features), 2))
    if len(features) >= 4:
        with afterwards("The layout of the features"):
            layout = tsne_layout(features, seed=trainer.args.seed)
    return {
        "metrics": metrics,
        "per_class": task.per_class(predicted["test"].predictions, predicted["test"].label_ids),
        "predictions": {split: prediction_lists(task, each.predictions) for split, each in predicted.items()},
        "layout": layout.tolist(),
        "labels": labels.tolist(),
    }


def batches_of(trainer: BiSSLTrainer, rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yields the rows as batches of evaluation, all of them on each process."""
    key = trainer.streams.key(Stream.EVALUATION)._replace(rank=0)
    # Trainer's own loader would give each process a part of them.
    for batch in DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator):
        yield trainer.streams.prepare(batch, key)


@dataclass
class AlignedRun:
    """A finished run, to be written and summed up by one process.

    Args:
        trainer ([`BiSSLTrainer`])
        task ([`DownstreamTask`])
        images ([`Images`])
        before, after (`Mapping[str, Any]`): what [`evaluate_stage`] has found, with `BEFORE_PREFIXES` and
            `AFTER_PREFIXES`.
    """

    trainer: BiSSLTrainer
    task: DownstreamTask
    images: Images
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(str(self.trainer.args.output_dir))

    def outcomes(self) -> dict[str, list[Evaluated]]:
        """Returns each model on the validation and on the test split."""
        found: dict[str, list[Evaluated]] = {}
        for model, stage, prefixes in (
            (BEFORE, self.before, BEFORE_PREFIXES),
            (AFTER, self.after, AFTER_PREFIXES),
            (UPPER, self.after, tuple(f"{prefix}_upper" for prefix in AFTER_PREFIXES)),
        ):
            test, validation = (metrics_under(stage["metrics"], prefix) for prefix in prefixes)
            # Of the upper model only the metrics are kept.
            predictions = stage["predictions"] if model != UPPER else {}
            found[model] = [
                evaluated(model, "validation", self.images.validation, predictions.get("validation"), validation),
                evaluated(model, "test", self.images.test, predictions.get("test"), test),
            ]
        return found

    def conclusions(self) -> list[str]:
        """Returns what the test split says of the difference, and whether BiSSL can have caused it."""
        history, outcomes = self.trainer.state.log_history, self.outcomes()
        pull = next((row["levels/pull"] for row in reversed(history) if "levels/pull" in row), None)
        found = difference(outcomes[BEFORE][-1], outcomes[AFTER][-1])
        sentences = [explain_difference(found), *judge_difference(found, pull)] if found else []
        return [*sentences, *explain_end(history)]

    def write_outputs(self) -> None:
        """Writes the model and the results; then figures, card and report."""
        trainer = self.trainer
        trainer.save_model(str(self.output))
        per_class = {"before_per_class": self.before["per_class"], "test_per_class": self.after["per_class"]}
        history = [row for row in trainer.state.log_history if "step" in row]
        write_json(
            self.output / RUN_RESULTS,
            {**self.before["metrics"], **self.after["metrics"], **per_class, "log_history": history},
        )
        before, (prefix, _) = BEFORE_PREFIXES[0], AFTER_PREFIXES
        head, rows = metrics_under(self.before["metrics"], before), len(self.images.test)
        levels = {"aligned": prefix, "upper": f"{prefix}_upper"}
        figures = {level: metrics_under(self.after["metrics"], name) for level, name in levels.items()}
        trainer.facts.evaluations = [
            Evaluation("Linear head on the pre-trained backbone", "test", head, rows, described=False),
            *evaluations_of_levels("test", figures, rows, exported=trainer.exported_level()),
        ]
        with afterwards("The figure of the losses"):
            start = {"epoch": 0.0, **self.start_figures()}
            plot_run(
                [start, *trainer.state.log_history],
                self.output / "figures" / "training.png",
                examples=len(self.images.validation),
            )
        with afterwards("The figure of the features"):
            self.plot_features(self.output / "figures" / "tsne.png")
        with afterwards("The model card"):
            trainer.create_model_card()
        with afterwards("The report"):
            write_report(self.report(), self.output)

    def start_figures(self) -> dict[str, float]:
        """Returns the figures of alternation 0 on the validation split, by their names in the history."""
        _, prefix = BEFORE_PREFIXES
        return {f"eval_{name}": value for name, value in metrics_under(self.before["metrics"], prefix).items()}

    def plot_features(self, path: Path) -> None:
        """Draws the layouts of the test features before and after."""
        layouts = []
        for title, (prefix, _), stage in (
            ("Before BiSSL", BEFORE_PREFIXES, self.before),
            ("After BiSSL", AFTER_PREFIXES, self.after),
        ):
            name, value = next(iter(name_metrics(stage["metrics"], prefix).items()), ("", ""))
            caption = f"{title}: classifier's {name} {value}" if name else title
            title = f"{caption} (n = {len(self.images.test):,})"
            layouts.append((title, np.reshape(stage["layout"], (-1, 2)), np.array(stage["labels"])))
        plot_layouts(layouts, self.task.class_names, path)

    def report(self) -> Report:
        """Returns the report of the run."""
        trainer, images, output = self.trainer, self.images, str(self.output)
        facts, outcomes, layout = trainer.facts, self.outcomes(), self.output / "figures" / "tsne.png"
        clock = {title: trainer.step_clock.seconds[name] for name, title in _PARTS.items()}
        return Report(
            title=f"BiSSL: alignment with {facts.dataset}",
            run=trainer.record(),
            data=data_lines(str(facts.dataset), images, (str(facts.lower_dataset), len(images.lower))),
            settings=settings_of_facts(facts),
            before=outcomes[BEFORE],
            after=outcomes[AFTER],
            beside=outcomes[UPPER],
            per_class_before=self.before["per_class"],
            per_class=self.after["per_class"],
            class_names=self.task.class_names,
            conclusions=self.conclusions(),
            start=self.start_figures(),
            views=sample_pictures(trainer, images.lower),
            errors=error_pictures(outcomes[AFTER][-1], images.test, self.task.class_names),
            layout=file_uri(layout) if layout.is_file() else None,
            seconds={**self.before["seconds"], **clock},
            folder=output,
            next_steps=[
                f"bissl-hf finetune --model {output} --dataset {facts.dataset}",
                f"bissl-hf predict --model {output} --inputs path/to/images",
            ],
        )

    def print_summary(self) -> None:
        """Prints the outcome, what it means and how to go on."""
        output, outcomes = for_terminal(self.output), self.outcomes()
        print(f"\n{format_outcomes([each for pair in zip(*outcomes.values(), strict=True) for each in pair])}\n")
        for sentence in self.conclusions():
            print(for_console(sentence))
        saved = {"aligned": "The aligned model", "upper": "The model of the upper level"}[
            self.trainer.exported_level()
        ]
        print(f"\n{saved} is in {output},\nboth levels in {output}/bilevel,")
        print(f"a report with all figures in {output}/report.html.")
        print("It is a plain transformers checkpoint, ready for fine-tuning:\n")
        print("    from transformers import AutoModelForImageClassification, pipeline")
        print(f'    model = AutoModelForImageClassification.from_pretrained("{output}")')
        print(f'    classify = pipeline("image-classification", model="{output}")\n')
