"""A model card, put together from the record of a run and from what only its user knows."""

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data.naming import PublicName, hub_repository, public_name
from ..paths import is_own_file
from ..text import for_markdown, for_terminal
from .descriptions import Description, describe, describe_converted
from .facts import ModelFacts, as_list, check_license
from .record import RunRecord, record_model, settings_of
from .tables import (
    Evaluation,
    evaluation_table,
    evaluations_of_levels,
    markdown_table,
    metrics_under,
    settings_table,
)

_TEMPLATE = Path(__file__).with_name("template.md")
_FIGURES = "figures"
_CAPTIONS = {
    **dict.fromkeys(("training", "pretraining", "finetuning"), "Training curves"),
    "tsne": "t-SNE of the features of test images",
}
# Named in the sections on data and base models, or not of interest.
_TOLD_ELSEWHERE = ("dataset", "lower_dataset", "lower_model", "upper_model", "backbone", "model", "license")
_REPOSITORY = re.compile(r"[\w./-]+")
_NO_NAME = "path/to/this/folder"


def build_model_card(
    record: RunRecord, facts: ModelFacts, *, folder: Path, model_name: str | None = None
) -> ModelCard:
    """Returns the card of a run's model, the same for the same run.

    Args:
        record ([`RunRecord`]): what the run knows.
        facts ([`ModelFacts`]): what it cannot know.
        folder (`Path`): where the card will be; figures in it are shown.
        model_name (`str`, *optional*): title; the name of the repository or of `folder` if not given.

    Raises:
        `ValueError`: if the licence is none that the Hub knows.
    """
    description = describe(record, has_both_levels=is_own_file(folder, "bilevel/config.json"))
    others = {part: settings_of(held) for part, held in facts.settings.items() if is_dataclass(held)}
    return _render(
        description,
        facts,
        folder=folder,
        repository=record.repository,
        model_name=model_name,
        evaluations=[*facts.evaluations, *logged_evaluations(record)],
        procedure=_procedure(record, description, facts),
        arguments_class=record.arguments_class,
        settings=settings_table({**record.settings, **others}, skip=_TOLD_ELSEWHERE),
    )


def build_converted_card(
    model: PreTrainedModel, facts: ModelFacts, *, folder: Path, repository: str | None = None
) -> ModelCard:
    """Returns the card of a model whose weights were converted, which no trainer here has seen.

    Args:
        model (`PreTrainedModel`)
        facts ([`ModelFacts`])
        folder (`Path`): where the card will be.
        repository (`str`, *optional*): its name at the Hub.

    Raises:
        `ValueError`: if the licence is none that the Hub knows.
    """
    return _render(describe_converted(record_model(model)), facts, folder=folder, repository=repository)


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
    name = for_terminal(model_name or (repository.split("/")[-1] if repository else folder.resolve().name))
    known = [public_name(dataset) if dataset else None for dataset in (facts.dataset, facts.lower_dataset)]
    figures = _figures(folder)
    return ModelCard.from_template(
        _metadata(description, facts, known, evaluations, name),
        template_str=_TEMPLATE.read_text(encoding="utf-8"),
        title=for_markdown(name),
        summary=description.summary,
        usage=[
            {**vars(snippet), "code": snippet.code.replace("{model}", _in_code(repository))}
            for snippet in description.usage
        ],
        data=_data_table(description, known),
        evaluation=evaluation_table(evaluations) if evaluations else "",
        evaluation_figures=[figure for figure in figures if "training" not in figure["path"]],
        training_figures=[figure for figure in figures if "training" in figure["path"]],
        **training,
        progress=description.progress,
        citations=description.citations,
    )


def _in_code(repository: str | None) -> str:
    """The repository between quotation marks of code; a name that cannot be one is left out."""
    return repository if repository and _REPOSITORY.fullmatch(repository) else _NO_NAME


def logged_evaluations(record: RunRecord) -> list[Evaluation]:
    """Returns the last evaluation on the data of evaluation that a run has logged; that of the best checkpoint if
    training ended by loading it."""
    logs = [log for log in record.log_history if any(name.startswith("eval_") for name in log)]
    best = record.best_step
    chosen = next((log for log in reversed(logs) if best is None or log["step"] == best), None)
    if chosen is None:
        return []
    size = record.examples.get("eval")
    upper = metrics_under(chosen, "eval_upper")
    return evaluations_of_levels(
        "validation", {"aligned": metrics_under(chosen, "eval"), "upper": upper}, size, exported=record.exported_level
    )


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
    task = for_terminal(task) if task else None
    config = for_terminal(facts.dataset_config) if facts.dataset_config else None
    results = list(_results(task, known[0], config, evaluations))
    repositories = list(dict.fromkeys(data.repository for data in known if data and data.repository))
    base_models = _base_models(description, facts)
    return ModelCardData(
        language=for_terminal(facts.language) if facts.language else None,
        license=facts.license,
        library_name=description.library,
        pipeline_tag=task,
        base_model=base_models[0] if len(base_models) == 1 else base_models or None,
        datasets=repositories or None,
        metrics=sorted({result.metric_type for result in results} - {"loss"}) or None,
        tags=[*description.tags, *map(for_terminal, facts.tags)],
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
                    dataset_name=for_terminal(data.title),
                    dataset_config=config or data.config,
                    dataset_revision=data.revision,
                    dataset_split=for_terminal(split),
                    metric_type=for_terminal(metric),
                    metric_name=for_terminal(metric.replace("_", " ").capitalize()),
                    metric_value=value,
                )


def _data_table(description: Description, known: Sequence[PublicName | None]) -> str:
    rows = []
    for (part, size), data in itertools.zip_longest(description.examples, known[: len(description.examples)]):
        row: dict[str, Any] = {"Part": part}
        if data:
            title = for_markdown(data.title)
            linked = f"[{title}](https://huggingface.co/datasets/{data.repository})"
            row["Data"] = linked if data.repository else title
        if size is not None:
            row["Examples"] = size
        if len(row) > 1:
            rows.append(row)
    return markdown_table(rows) if rows else ""


def _figures(folder: Path) -> list[dict[str, str]]:
    """The figures in a folder, as the card refers to them. Those behind symbolic links are not pushed, nor shown."""
    paths = [
        path for path in sorted((folder / _FIGURES).glob("*.png")) if is_own_file(folder, f"{_FIGURES}/{path.name}")
    ]
    return [
        {
            "caption": _CAPTIONS.get(path.stem) or for_markdown(path.stem.replace("_", " ").capitalize()),
            "path": f"{_FIGURES}/{quote(path.name, errors='replace')}",
        }
        for path in paths
    ]


def _procedure(record: RunRecord, description: Description, facts: ModelFacts) -> str:
    links = [f"[{name}](https://huggingface.co/{name})" for name in _base_models(description, facts)]
    start = f"Training started from {' and '.join(links)}. " if links else ""
    processes = "one process" if record.num_processes == 1 else f"{record.num_processes} processes"
    listed = ", ".join(f"{package} {version}" for package, version in record.versions.items())
    return f"{start}{record.steps:,} steps were taken on {processes} ({record.device}) with {listed}."
