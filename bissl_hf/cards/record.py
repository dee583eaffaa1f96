"""What a card is made from, as plain data: a record of a run, and one of each of its models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from importlib import metadata
from typing import Any

from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modelcard import TASK_MAPPING
from transformers.pipelines import SUPPORTED_TASKS

from ..data.naming import hub_repository

_PACKAGES = ("bissl_hf", "transformers", "torch", "datasets")


@dataclass(frozen=True)
class ModelRecord:
    """What a card says of a model.

    Args:
        class_name, model_type (`str`): of the model and of its configuration.
        num_parameters (`int`)
        task (`str`, *optional*): name of the pipeline that runs the model.
        loader (`str`, *optional*): class that loads it for that task; its own if not given.
        has_pipeline (`bool`): whether `transformers.pipeline` runs it.
        processor (`str`, *optional*): class that loads what prepares its inputs.
        class_names (`Sequence[str]`): of a classifier, in the order of its outputs.
        takes_images (`bool`): whether its input is pixels.
        hub_ids (`Sequence[str]`): repositories from which it was loaded.
    """

    class_name: str
    model_type: str
    num_parameters: int
    task: str | None = None
    loader: str | None = None
    has_pipeline: bool = False
    processor: str | None = None
    class_names: Sequence[str] = ()
    takes_images: bool = False
    hub_ids: Sequence[str] = ()


@dataclass(frozen=True)
class Settings:
    """Arguments of a part of a run, and their defaults, by name."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """What a card says of a run and its model.

    Args:
        kind (`str`): `aligned`, `pretext`, `classifier` or `joint`.
        models (`Mapping[str, ModelRecord]`): `model`; of a pair `upper` and `lower`.
        arguments (`Mapping[str, Any]`): all arguments of the trainer by name.
        arguments_class (`str`): name of the class of the arguments.
        settings (`Mapping[str, Settings]`): the arguments that decide what a run computes, by the part of the run.
        examples (`Mapping[str, int]`): sizes of the data sets `train`, `lower` and `eval`, where there are such.
        log_history (`Sequence[Mapping[str, Any]]`): what was logged, in order.
        steps (`int`): taken so far.
        best_step (`int`, *optional*): step of the checkpoint that the end of training has loaded.
        exported_level (`str`): of a pair the level that is saved as the model: `aligned`, or `upper`.
        seconds (`float`): of training so far.
        repository (`str`, *optional*): name at the Hub.
        num_processes (`int`)
        device (`str`): type of the device.
        versions (`Mapping[str, str]`): of the packages.
    """

    kind: str
    models: Mapping[str, ModelRecord]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    arguments_class: str = "TrainingArguments"
    settings: Mapping[str, Settings] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)
    log_history: Sequence[Mapping[str, Any]] = ()
    steps: int = 0
    best_step: int | None = None
    exported_level: str = "aligned"
    seconds: float = 0.0
    repository: str | None = None
    num_processes: int = 1
    device: str = "cpu"
    versions: Mapping[str, str] = field(default_factory=dict)


def record_model(model: PreTrainedModel, processing_class: Any = None) -> ModelRecord:
    """Returns the record of a model and of what prepares its inputs."""
    task, config = task_of(type(model).__name__), model.config
    pipelines: dict[str, Any] = dict(SUPPORTED_TASKS)
    loaders = pipelines.get(task or "", {}).get("pt", ())
    processor = (
        "AutoImageProcessor" if isinstance(processing_class, BaseImageProcessor)
        else "AutoTokenizer" if isinstance(processing_class, PreTrainedTokenizerBase)
        else None
    )  # fmt: skip
    labelled = task is not None and config.num_labels
    return ModelRecord(
        class_name=type(model).__name__,
        model_type=config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        task=task,
        loader=loaders[0].__name__ if loaders else None,
        has_pipeline=bool(loaders),
        processor=processor,
        class_names=tuple(str(name) for _, name in sorted((config.id2label or {}).items())) if labelled else (),
        takes_images=model.main_input_name == "pixel_values",
        hub_ids=loaded_from_hub(config, getattr(config, "backbone_config", None)),
    )


def settings_of(holder: Any, is_included: Callable[[str], bool] = lambda name: True) -> Settings:
    """Returns the fields of a dataclass with their defaults.

    Args:
        holder: an instance of a dataclass.
        is_included (`Callable[[str], bool]`, *optional*): which fields, by name; all if not given.
    """
    values, defaults = {}, {}
    for entry in fields(holder):
        if is_included(entry.name):
            values[entry.name] = getattr(holder, entry.name)
            default = entry.default if entry.default is not MISSING else None
            defaults[entry.name] = entry.default_factory() if entry.default_factory is not MISSING else default
    return Settings(values, defaults)


def installed_versions() -> dict[str, str]:
    """Returns the versions of this package and of those below it, as they are installed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def task_of(class_name: str) -> str | None:
    """Returns the name of the pipeline for a class of `transformers`, or `None` if there is none."""
    mappings: dict[str, Any] = dict(TASK_MAPPING)
    return next((task for task, names in mappings.items() if class_name in names.values()), None)


def loaded_from_hub(*configs: PretrainedConfig | None) -> list[str]:
    """Returns the Hub ids from which models with these configurations were loaded, where they were."""
    names = [
        hub_repository(config.name_or_path) for config in configs if config and getattr(config, "_commit_hash", None)
    ]
    return list(dict.fromkeys(name for name in names if name))
