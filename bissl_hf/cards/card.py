"""A model card, put together from what a run knows about its model."""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .. import __version__
from ..data.naming import PublicName, hub_repository, public_name
from .facts import ModelFacts, as_list, check_license
from .tables import Evaluation, evaluation_table, markdown_table, metrics_under, settings_table
from .text import Description, describe_converted

if TYPE_CHECKING:
    from ..trainer.resumable_trainer import ResumableTrainer

_TEMPLATE = Path(__file__).with_name("template.md")
_FIGURES = "figures"
_CAPTIONS = {
    **dict.fromkeys(("training", "pretraining", "finetuning"), "Training curves"),
    "tsne": "t-SNE of the features of test images",
}
# Named in the sections on data and base models, or not of interest.
_TOLD_ELSEWHERE = ("dataset", "lower_dataset", "lower_model", "upper_model", "backbone", "model", "license")
_NO_NAME = "path/to/this/folder"


def build_model_card(
    trainer: "ResumableTrainer",
    description: Description,
    facts: ModelFacts,
    *,
    folder: Path,
    model_name: str | None = None,
) -> ModelCard:
    """Returns the card of a trainer's model, the same for the same run.

    Args:
        trainer ([`ResumableTrainer`]): its arguments, state and data sets are read.
        description ([`Description`]): of the kind of model.
        facts ([`ModelFacts`]): what the trainer cannot know.
        folder (`Path`): where the card will lie; figures in it are shown.
        model_name (`str`, *optional*): title; the name of the repository or of `folder` if not given.

    Raises:
        `ValueError`: if the licence is none that the Hub knows.
    """
    return _render(
        description,
        facts,
        folder=folder,
        repository=trainer.hub_model_id or trainer.args.hub_model_id,
        model_name=model_name,
        evaluations=[*facts.evaluations, *logged_evaluations(trainer)],
        procedure=_procedure(trainer, description, facts),
        arguments_class=type(trainer.args).__name__,
        settings=settings_table(trainer.args, facts.settings, skip=_TOLD_ELSEWHERE),
    )


def build_converted_card(
    model: PreTrainedModel, facts: ModelFacts, *, folder: Path, repository: str | None = None
) -> ModelCard:
    """Returns the card of a model whose weights were converted, which no trainer here has seen.

    Args:
        model (`PreTrainedModel`)
        facts ([`ModelFacts`])
        folder (`Path`): where the card will lie.
        repository (`str`, *optional*): its name at the Hub.

    Raises:
        `ValueError`: if the licence is none that the Hub knows.
    """
    return _render(describe_converted(model), facts, folder=folder, repository=repository)


def _render(
    description: Description,
    facts: ModelFacts,
    *,
    folder: Path,
    repository: str | None,
    model_name: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    **training: str,
) -> ModelCard:
    """Fills the template; `training` is what its section on training takes, which is left out without a procedure."""
    check_license(facts.license)
    name = model_name or (repository.split("/")[-1] if repository else folder.resolve().name)
    known = [public_name(dataset) if dataset else None for dataset in (facts.dataset, facts.lower_dataset)]
    figures = _figures(folder)
    return ModelCard.from_template(
        _metadata(description, facts, known, evaluations, name),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=name,
        summary=description.summary,
        usage=[
            {**vars(snippet), "code": snippet.code.replace("{model}", repository or _NO_NAME)}
            for snippet in description.usage
        ],
        data=_data_table(description, known),
        evaluation=evaluation_table(evaluations) if evaluations else "",
        evaluation_figures=[figure for figure in figures if "training" not in figure["path"]],
        training_figures=[figure for figure in figures if "training" in figure["path"]],
        **training,
        statistics_title=description.statistics_title,
        statistics=description.statistics,
        citations=description.citations,
    )


def logged_evaluations(trainer: "ResumableTrainer") -> list[Evaluation]:
    """Returns the last evaluation on `eval_dataset` that a trainer has logged; that of the best checkpoint if training
    ended by loading it."""
    logs = [log for log in trainer.state.log_history if any(name.startswith("eval_") for name in log)]
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    chosen = next((log for log in reversed(logs) if best is None or log["step"] == best), None)
    if chosen is None:
        return []
    rows: Any = trainer.eval_dataset
    size = len(rows) if rows is not None else None
    evaluations = [Evaluation("This model", "validation", metrics_under(chosen, "eval"), size)]
    if upper := metrics_under(chosen, "eval_upper"):
        evaluations.append(Evaluation("The upper level's model", "validation", upper, size, described=False))
    return evaluations


def _base_models(description: Description, facts: ModelFacts) -> list[str]:
    named = [name for name in map(hub_repository, as_list(facts.base_model)) if name]
    return named or list(description.base_models)


def _metadata(
    description: Description,
    facts: ModelFacts,
    known: Sequence[PublicName | None],
    evaluations: Sequence[Evaluation],
    name: str,
) -> ModelCardData:
    task = facts.task or description.task
    results = list(_results(task, known[0], facts.dataset_config, evaluations))
    repositories = list(dict.fromkeys(data.repository for data in known if data and data.repository))
    base_models = _base_models(description, facts)
    return ModelCardData(
        language=facts.language,
        license=facts.license,
        library_name=description.library,
        pipeline_tag=task,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=repositories or None,
        metrics=sorted({result.metric_type for result in results} - {"loss"}) or None,
        tags=[*description.tags, *facts.tags],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(
    task: str | None, data: PublicName | None, config: str | None, evaluations: Sequence[Evaluation]
) -> Iterator[EvalResult]:
    """Yields the numbers of the model itself, where the task and the data set, which the Hub requires, are known. A
    split that was taken from the training images has no name there and is left out."""
    if task is None or data is None or data.identifier is None:
        return
    for evaluation in evaluations:
        split = data.splits.get(evaluation.split) if data.splits else evaluation.split
        for metric, value in evaluation.metrics.items():
            if evaluation.described and split and math.isfinite(value):
                yield EvalResult(
                    task_type=task,
                    task_name=task.replace("-", " ").capitalize(),
                    dataset_type=data.identifier,
                    dataset_name=data.title,
                    dataset_config=config or data.config,
                    dataset_revision=data.revision,
                    dataset_split=split,
                    metric_type=metric,
                    metric_name=metric.replace("_", " ").capitalize(),
                    metric_value=value,
                )


def _data_table(description: Description, known: Sequence[PublicName | None]) -> str:
    rows = []
    for (part, size), data in itertools.zip_longest(description.examples, known[: len(description.examples)]):
        row: dict[str, Any] = {"Part": part}
        if data:
            linked = f"[{data.title}](https://huggingface.co/datasets/{data.repository})"
            row["Data"] = linked if data.repository else data.title
        if size is not None:
            row["Examples"] = size
        if len(row) > 1:
            rows.append(row)
    return markdown_table(rows) if rows else ""


def _figures(folder: Path) -> list[dict[str, str]]:
    """The figures in a folder, as the card refers to them."""
    paths = sorted((folder / _FIGURES).glob("*.png"))
    return [
        {
            "caption": _CAPTIONS.get(path.stem, path.stem.replace("_", " ").capitalize()),
            "path": f"{_FIGURES}/{path.name}",
        }
        for path in paths
    ]


def _procedure(trainer: "ResumableTrainer", description: Description, facts: ModelFacts) -> str:
    args = trainer.args
    links = [f"[{name}](https://huggingface.co/{name})" for name in _base_models(description, facts)]
    start = f"Training started from {' and '.join(links)}. " if links else ""
    processes = "one process" if args.world_size == 1 else f"{args.world_size} processes"
    versions = {
        "bissl_hf": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "datasets": datasets.__version__,
    }
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{start}{trainer.state.global_step:,} steps were taken on {processes} ({args.device.type}) with {listed}."
