"""The models of a run, from what its arguments name."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel, ViTMAEForPreTraining

from ..evaluation.metrics import SINGLE_LABEL
from ..models import pretext
from ..models.adapters import train_heads
from ..models.auto import PRETEXT_MODELS, pretext_class
from ..models.backbone import load_backbone
from ..models.classifier import classifier_on, new_classifier, set_labels
from ..models.configuration_backbone import resnet18_config
from ..models.configuration_bissl import BiSSLConfig
from ..models.image_size import adapt_image_size, config_for_image_size
from ..models.loading import load_pretrained
from ..models.mae import freeze_positions
from ..models.modeling_bissl import BiSSLModel
from ..models.pretext import pretext_tasks
from .adapters import LoraArguments
from .loading import load_config, loading


@dataclass
class PretextModelArguments:
    """Where the pretext model comes from."""

    pretext: str | None = field(
        default=None,
        metadata={"help": f"Pretext task: {', '.join(pretext_tasks())}; that of --lower_model, or else simclr."},
    )
    lower_model: str | None = field(default=None, metadata={"help": "Pre-trained pretext model: a folder or Hub id."})
    backbone: str | None = field(
        default=None, metadata={"help": "Backbone to start from: a folder or Hub id; a ResNet-18 if not given."}
    )
    backbone_init: str = field(
        default="pretrained",
        metadata={"help": "pretrained: load --backbone's weights; random: its architecture only."},
    )
    projection_dims: list[int] | None = field(
        default=None, metadata={"help": "Widths of the projection head; those of the task if not given."}
    )
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the NT-Xent loss; 0.5."})
    mask_ratio: float | None = field(default=None, metadata={"help": "Share of masked patches of mae; 0.75."})

    def loaded_models(self) -> list[str]:
        """Returns the models, as the user named them, whose weights training starts from."""
        backbone = self.backbone if self.backbone_init == "pretrained" else None
        return [name for name in (self.lower_model, backbone) if name]

    @property
    def pretext_task(self) -> str:
        """Name of the pretext task: the one that was given, or that of the lower model, or `"simclr"`.

        Raises:
            `ValueError`: for an unknown task, or a lower model of another one.
        """
        if self.pretext is not None and self.pretext not in pretext_tasks():
            raise ValueError(f"pretext is {self.pretext!r}; it must be one of {', '.join(pretext_tasks())}.")
        if not self.lower_model:
            return self.pretext or "simclr"
        own = _task_of(load_config("lower_model", self.lower_model), self.lower_model)
        if self.pretext not in (None, own):
            raise ValueError(
                f"pretext is {self.pretext}, and lower_model {self.lower_model} is a model of {own}; leave pretext "
                "out."
            )
        return own

    def task_settings(self) -> dict[str, Any]:
        """Returns the settings of the pretext task that were given.

        Raises:
            `ValueError`: for an unknown task, or a setting that the task does not have.
        """
        task = self.pretext_task
        owners = {
            "projection_dims": [name for name in pretext_tasks() if name != "mae"],
            "temperature": ["simclr"],
            "mask_ratio": ["mae"],
        }
        given = {name: value for name in owners if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if task not in owners[name]:
                raise ValueError(
                    f"{name} is {value}, which the pretext task {task} does not have; it is for "
                    f"{', '.join(owners[name])}. Leave it out."
                )
        return given


def build_pretext_model(arguments: PretextModelArguments, image_size: int | None = None) -> PreTrainedModel:
    """Returns the pretext model that the arguments name: loaded whole, or a new head on a backbone.

    Args:
        arguments ([`PretextModelArguments`])
        image_size (`int`, *optional*): side of the images that it shall take, in pixels; its own if not given.

    Raises:
        `ValueError`: if the arguments contradict each other or name another kind of model.
    """
    if arguments.backbone_init not in ("pretrained", "random"):
        raise ValueError(f"backbone_init is {arguments.backbone_init!r}; it must be pretrained or random.")
    if arguments.lower_model and arguments.backbone:
        raise ValueError("Both lower_model and backbone are given; a lower model brings its backbone, so drop one.")
    settings = arguments.task_settings()
    if arguments.lower_model:
        return _resized(_load_pretext_model(arguments.lower_model, arguments.pretext_task), image_size)
    if arguments.backbone and arguments.backbone_init == "pretrained":
        with loading("backbone", arguments.backbone):
            backbone = load_backbone(arguments.backbone)
        return pretext.build_pretext_model(arguments.pretext_task, _resized(backbone, image_size), **settings)
    config = load_config("backbone", arguments.backbone) if arguments.backbone else resnet18_config()
    if image_size is not None:
        config = config_for_image_size(config, image_size)
    return pretext.new_pretext_model(arguments.pretext_task, config, **settings)


def _resized(model: PreTrainedModel, image_size: int | None) -> PreTrainedModel:
    return model if image_size is None else adapt_image_size(model, image_size)


def _task_of(config: PretrainedConfig, source: str) -> str:
    """Returns the pretext task whose model a lower model is.

    Raises:
        `ValueError`: if it is none of one.
    """
    if config.model_type in PRETEXT_MODELS:
        return config.model_type
    if config.model_type == "vit_mae":
        return "mae"
    raise ValueError(
        f"lower_model {source} is a {config.model_type!r} model; it must be one of a pretext task "
        f"({', '.join(pretext_tasks())}). To put the head of a pretext task on it pass it as --backbone."
    )


def _load_pretext_model(source: str, task: str) -> PreTrainedModel:
    with loading("lower_model", source):
        if task == "mae":
            return freeze_positions(load_pretrained(ViTMAEForPreTraining, source))
        return load_pretrained(pretext_class(task), source)


def load_classifier(
    source: str, class_names: Sequence[str], *, field: str, problem_type: str = SINGLE_LABEL
) -> PreTrainedModel:
    """Loads an image classifier with its head.

    Args:
        source (`str`): folder or Hub id.
        class_names (`Sequence[str]`): of the data set.
        field (`str`): the argument that names the model, for messages.
        problem_type (`str`, *optional*): whether an image has one class or may have several; decides the loss.

    Raises:
        `ValueError`: if it has other classes, or the same in another order.
    """
    with loading(field, source):
        model = load_pretrained(AutoModelForImageClassification, source)
    if model.config.num_labels != len(class_names):
        raise ValueError(
            f"{field} {source} has {model.config.num_labels} classes and the data set has "
            f"{len(class_names)}; leave {field} out for a new head."
        )
    names = [model.config.id2label[number] for number in range(len(class_names))]
    if sorted(names) == sorted(class_names) and names != list(class_names):
        raise ValueError(
            f"{field} {source} has the classes of the data set in another order ({', '.join(names[:4])}, ... instead "
            f"of {', '.join(class_names[:4])}, ...), which its head cannot follow; leave {field} out for a new head."
        )
    set_labels(model.config, class_names, problem_type=problem_type)
    return model


@dataclass
class StartArguments:
    """What fine-tuning starts from."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "What to fine-tune: an image classifier, a backbone, a pretext model or the output of BiSSL, as a "
            "folder or Hub id; a ResNet-18 with random weights if not given."
        },
    )
    model_init: str = field(
        default="pretrained", metadata={"help": "pretrained: load --model's weights; random: its architecture only."}
    )
    model_level: str = field(
        default="aligned",
        metadata={
            "help": "Of a folder with both levels of BiSSL: aligned, the backbone of the lower level; or upper.",
            "choices": ["aligned", "upper"],
        },
    )
    keep_head: bool = field(
        default=False, metadata={"help": "Keep the head of the classifier; else it gets a new one."}
    )


def classifier_builder(
    arguments: StartArguments,
    class_names: Sequence[str],
    *,
    problem_type: str = SINGLE_LABEL,
    image_size: int | None = None,
    lora: LoraArguments | None = None,
) -> Callable[[], PreTrainedModel]:
    """Returns a function that builds the classifier to fine-tune; the weights are read once, and a new head is drawn
    from torch's random state at each call.

    Args:
        arguments ([`StartArguments`])
        class_names (`Sequence[str]`): of the data set.
        problem_type (`str`, *optional*): whether an image has one class or may have several.
        image_size (`int`, *optional*): side of the images that it shall take, in pixels; its own if not given.
        lora ([`LoraArguments`], *optional*): adapters to add, with the head trained beside them.

    Raises:
        `ValueError`: if the arguments contradict each other, or the model does not fit.
        `RuntimeError`: if there shall be adapters, and `peft` is not installed.
    """
    build = _classifier_builder(arguments, class_names, problem_type, image_size)
    if lora is None or lora.lora_rank is None:
        if lora is not None:
            lora.adapt()  # which refuses settings of adapters without a rank
        return build

    def build_with_adapters() -> PreTrainedModel:
        model = build()
        lora.adapt(model)
        train_heads(model)
        return model

    return build_with_adapters


def _classifier_builder(
    arguments: StartArguments, class_names: Sequence[str], problem_type: str, image_size: int | None
) -> Callable[[], PreTrainedModel]:
    if arguments.model_init not in ("pretrained", "random"):
        raise ValueError(f"model_init is {arguments.model_init!r}; it must be pretrained or random.")
    if arguments.keep_head:
        if arguments.model is None or arguments.model_init == "random":
            raise ValueError("keep_head is true; it needs a model with pretrained weights.")
        whole = _resized(_load_whole(arguments.model, class_names, problem_type), image_size)
        return lambda: copy.deepcopy(whole)
    if arguments.model is None or arguments.model_init == "random":
        config = _backbone_config(arguments.model)
        if image_size is not None:
            config = config_for_image_size(config, image_size)
        return lambda: new_classifier(config, class_names, problem_type=problem_type)
    backbone = _resized(_load_backbone(arguments.model, arguments.model_level), image_size)
    return lambda: classifier_on(backbone, class_names, problem_type=problem_type)


def _backbone_config(source: str | None) -> PretrainedConfig:
    config: Any = load_config("model", source) if source else resnet18_config()
    if isinstance(config, BiSSLConfig):
        return config.upper_config
    return config.backbone_config if config.model_type in PRETEXT_MODELS else config


def _load_backbone(source: str, level: str) -> PreTrainedModel:
    config = load_config("model", source)
    if level == "upper" and not isinstance(config, BiSSLConfig):
        raise ValueError(
            f"model_level is upper, and model {source} is a {config.model_type!r} model of one level; name the folder "
            "`bilevel` in the output of BiSSL, or leave model_level out."
        )
    with loading("model", source):
        if isinstance(config, BiSSLConfig):
            both = load_pretrained(BiSSLModel, source)
            return both.upper if level == "upper" else both.aligned_model()
        return load_backbone(source)


def _load_whole(source: str, class_names: Sequence[str], problem_type: str) -> PreTrainedModel:
    config = load_config("model", source)
    if isinstance(config, BiSSLConfig) or config.model_type in PRETEXT_MODELS:
        raise ValueError(
            f"model {source} is a {config.model_type!r} model, which is no image classifier; leave keep_head out."
        )
    return load_classifier(source, class_names, field="model", problem_type=problem_type)
