"""What an alignment leaves: evaluations before and after, figures, results, card, report and summary."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset

from ..cards.tables import Evaluation, metrics_under
from ..checkpoints import write_json
from ..data.alternation import Stream
from ..data.augment import TwoViewTransform
from ..evaluation.features import extract_features, tsne_layout, with_one_class
from ..evaluation.figures import plot_layouts, plot_run
from ..report.page import interval_text, write_report
from ..report.pictures import file_uri
from ..report.reading import explain_difference, explain_end, judge_difference
from ..report.record import Evaluated, Report
from ..text import for_console
from ..trainer.bissl_trainer import BiSSLTrainer
from .levels import Images
from .outputs import RUN_RESULTS, format_table, name_metrics
from .reporting import data_lines, difference, error_pictures, evaluated, prediction_lists, settings_of_facts
from .tasks import DownstreamTask
from .views import sample_views, view_pictures

TSNE_ROWS = 1000
BEFORE, AFTER = "linear head, before BiSSL", "aligned model, after BiSSL"


def evaluate_stage(trainer: BiSSLTrainer, task: DownstreamTask, images: Images, prefix: str) -> dict[str, Any]:
    """The aligned model's metrics and predictions on the test and validation split, and a layout of its features."""
    metrics = trainer.evaluate(images.test, metric_key_prefix=prefix)
    predicted = trainer.predict(images.test)
    validation = trainer.predict(images.validation, metric_key_prefix="validation")
    rows: Dataset = Subset(images.test, range(min(len(images.test), TSNE_ROWS)))
    features, labels = with_one_class(*extract_features(trainer.aligned_model(), batches_of(trainer, rows)))
    layout = tsne_layout(features, seed=trainer.args.seed) if len(features) >= 4 else np.zeros((len(features), 2))
    return {
        "metrics": metrics,
        "per_class": task.per_class(predicted.predictions, predicted.label_ids),
        "layout": layout.tolist(),
        "labels": labels.tolist(),
        "test": prediction_lists(task, predicted.predictions),
        "validation": prediction_lists(task, validation.predictions),
        "validation_metrics": metrics_under(validation.metrics or {}, "validation"),
    }


def batches_of(trainer: BiSSLTrainer, rows: Dataset) -> Iterator[dict[str, Any]]:
    """Yields the rows as batches of evaluation, all of them on each process."""
    key = trainer.streams.key(Stream.EVALUATION)._replace(rank=0)
    # Trainer's own loader would give each process a part of them.
    for batch in DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator):
        yield trainer.streams.prepare(batch, key)


def compared(stage: Mapping[str, Any], model: str, images: Images, prefix: str) -> list[Evaluated]:
    """Returns a stage on the validation and on the test split."""
    return [
        evaluated(model, "validation", images.validation, stage["validation"], stage["validation_metrics"]),
        evaluated(model, "test", images.test, stage["test"], metrics_under(stage["metrics"], prefix)),
    ]


def conclusions(trainer: BiSSLTrainer, before: Evaluated, after: Evaluated) -> list[str]:
    """Returns what the test split says of the difference, and whether BiSSL can have caused it."""
    history = trainer.state.log_history
    pull = next((row["levels/pull"] for row in reversed(history) if "levels/pull" in row), None)
    found = difference(before, after)
    sentences = [explain_difference(found), *judge_difference(found, pull)] if found else []
    return [*sentences, *explain_end(history)]


def write_outputs(
    trainer: BiSSLTrainer,
    task: DownstreamTask,
    images: Images,
    stages: Mapping[str, Mapping[str, Any]],
    views: TwoViewTransform,
) -> Report:
    """Writes the model, figures, results, card and report.

    Args:
        trainer ([`BiSSLTrainer`])
        task ([`DownstreamTask`])
        images ([`Images`])
        stages (`Mapping`): `before` and `test`, see [`evaluate_stage`].
        views ([`TwoViewTransform`]): of the pretext task.
    """
    output, before, after = Path(str(trainer.args.output_dir)), stages["before"], stages["test"]
    trainer.save_model(output)
    start = start_figures(before)
    plot_run([{"epoch": 0.0, **start}, *trainer.state.log_history], output / "figures" / "training.png")
    _plot_layouts(stages, task.class_names, len(images.test), output)
    history = [row for row in trainer.state.log_history if "step" in row]
    per_class = {"before_per_class": before["per_class"], "test_per_class": after["per_class"]}
    validation = {f"{name}_validation": stages[name]["validation_metrics"] for name in stages}
    write_json(
        output / RUN_RESULTS,
        {**before["metrics"], **after["metrics"], **per_class, **validation, "log_history": history},
    )
    head = metrics_under(before["metrics"], "before")
    trainer.facts.evaluations = [
        Evaluation("Linear head on the pre-trained backbone", "test", head, len(images.test), described=False),
        Evaluation("This model", "test", metrics_under(after["metrics"], "test"), len(images.test)),
    ]
    trainer.create_model_card()
    report = build_report(trainer, task, images, stages, views)
    write_report(report, output)
    return report


def _plot_layouts(
    stages: Mapping[str, Mapping[str, Any]], class_names: list[str], num_images: int, output: Path
) -> None:
    layouts = []
    for title, prefix in (("Before BiSSL", "before"), ("After BiSSL", "test")):
        stage = stages[prefix]
        name, value = next(iter(name_metrics(stage["metrics"], prefix).items()))
        caption = f"{title}: classifier's {name} {value} (n = {num_images})"
        layouts.append((caption, np.reshape(stage["layout"], (-1, 2)), np.array(stage["labels"])))
    plot_layouts(layouts, class_names, output / "figures" / "tsne.png")


def start_figures(before: Mapping[str, Any]) -> dict[str, float]:
    """Returns the figures of alternation 0 by their names in the history."""
    return {f"eval_{name}": value for name, value in before["validation_metrics"].items()}


def build_report(
    trainer: BiSSLTrainer,
    task: DownstreamTask,
    images: Images,
    stages: Mapping[str, Mapping[str, Any]],
    views: TwoViewTransform,
) -> Report:
    """Returns the report of a finished run."""
    output, facts = str(trainer.args.output_dir), trainer.facts
    before = compared(stages["before"], BEFORE, images, "before")
    after = compared(stages["test"], AFTER, images, "test")
    clock = trainer.step_clock.seconds
    names = {"lower": "Lower steps", "upper": "Upper steps", "between": "Evaluation and checkpoints"}
    return Report(
        title=f"BiSSL: alignment with {facts.dataset}",
        run=trainer.record(),
        data=data_lines(str(facts.dataset), images, (str(facts.lower_dataset), len(images.lower))),
        settings=settings_of_facts(facts),
        before=before,
        after=after,
        per_class_before=stages["before"]["per_class"],
        per_class=stages["test"]["per_class"],
        class_names=task.class_names,
        conclusions=conclusions(trainer, before[1], after[1]),
        start=start_figures(stages["before"]),
        views=view_pictures(sample_views(images.lower, views, seed=trainer.args.seed)),
        errors=error_pictures(after[1], images.test, task.class_names),
        layout=file_uri(Path(output) / "figures" / "tsne.png"),
        seconds={**stages["before"].get("seconds", {}), **{title: clock[name] for name, title in names.items()}},
        folder=output,
        next_steps=[
            f"bissl-hf finetune --model {output} --dataset {facts.dataset}",
            f"bissl-hf predict --model {output} --inputs path/to/images",
        ],
    )


def print_summary(report: Report) -> None:
    """Prints the outcome, what it means and how to go on."""
    rows = [
        {
            "model": each.model,
            "split": each.split,
            "n": f"{each.examples:,}",
            **_short(name_metrics({f"_{name}": value for name, value in each.metrics.items()}, "")),
            "95 % interval": interval_text(each),
            "loss": f"{each.metrics['loss']:.4f}",
        }
        for pair in zip(report.before, report.after, strict=True)
        for each in pair
    ]
    print(f"\n{format_table(rows)}\n")
    for sentence in report.conclusions:
        print(for_console(sentence))
    output = report.folder
    print(f"\nThe aligned model is in {output}, both levels in {output}/bilevel,")
    print(f"a report with all figures in {output}/report.html.")
    print("It is a plain transformers checkpoint, ready for fine-tuning:\n")
    print("    from transformers import AutoModelForImageClassification, pipeline")
    print(f'    model = AutoModelForImageClassification.from_pretrained("{output}")')
    print(f'    classify = pipeline("image-classification", model="{output}")\n')


def _short(metrics: Mapping[str, str]) -> dict[str, str]:
    """Titles by which the table keeps to 100 columns."""
    titles = {"top-5 accuracy": "top 5", "mean per class": "per class"}
    return {titles.get(name, name): value for name, value in metrics.items()}
