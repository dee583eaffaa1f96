"""The models of a run, from what its arguments name."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel, ViTMAEForPreTraining

from ..evaluation.metrics import SINGLE_LABEL
from ..models import pretext
from ..models.auto import PRETEXT_MODELS, pretext_class
from ..models.backbone import load_backbone
from ..models.classifier import classifier_on, new_classifier, set_labels
from ..models.configuration_backbone import resnet18_config
from ..models.configuration_bissl import BiSSLConfig
from ..models.finite import with_finite_weights
from ..models.mae import freeze_positions
from ..models.modeling_bissl import BiSSLModel
from ..models.pretext import pretext_tasks
from .loading import load_config, loading


@dataclass
class PretextModelArguments:
    """Where the pretext model comes from."""

    pretext: str = field(default="simclr", metadata={"help": f"Pretext task: {', '.join(pretext_tasks())}."})
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

    def task_settings(self) -> dict[str, Any]:
        """Returns the settings of the pretext task that were given.

        Raises:
            `ValueError`: for an unknown task, or a setting that the task does not have.
        """
        if self.pretext not in pretext_tasks():
            raise ValueError(f"pretext is {self.pretext!r}; it must be one of {', '.join(pretext_tasks())}.")
        owners = {
            "projection_dims": [name for name in pretext_tasks() if name != "mae"],
            "temperature": ["simclr"],
            "mask_ratio": ["mae"],
        }
        given = {name: value for name in owners if (value := getattr(self, name)) is not None}
        for name, value in given.items():
            if self.pretext not in owners[name]:
                raise ValueError(
                    f"{name} is {value}, which the pretext task {self.pretext} does not have; it is for "
                    f"{', '.join(owners[name])}. Leave it out."
                )
        return given


def build_pretext_model(arguments: PretextModelArguments) -> PreTrainedModel:
    """Returns the pretext model that the arguments name: loaded whole, or a new head on a backbone.

    Raises:
        `ValueError`: if the arguments contradict each other or name another kind of model.
    """
    settings = arguments.task_settings()
    if arguments.backbone_init not in ("pretrained", "random"):
        raise ValueError(f"backbone_init is {arguments.backbone_init!r}; it must be pretrained or random.")
    if arguments.lower_model and arguments.backbone:
        raise ValueError("Both lower_model and backbone are given; a lower model brings its backbone, so drop one.")
    if arguments.lower_model:
        return _load_pretext_model(arguments.lower_model)
    if arguments.backbone and arguments.backbone_init == "pretrained":
        with loading("backbone", arguments.backbone):
            backbone = load_backbone(arguments.backbone)
        return pretext.build_pretext_model(arguments.pretext, backbone, **settings)
    config = load_config("backbone", arguments.backbone) if arguments.backbone else resnet18_config()
    return pretext.new_pretext_model(arguments.pretext, config, **settings)


def _load_pretext_model(source: str) -> PreTrainedModel:
    config = load_config("lower_model", source)
    with loading("lower_model", source):
        if config.model_type in PRETEXT_MODELS:
            return with_finite_weights(pretext_class(config.model_type).from_pretrained(source), source)
        if config.model_type == "vit_mae":
            return with_finite_weights(freeze_positions(ViTMAEForPreTraining.from_pretrained(source)), source)
    raise ValueError(
        f"lower_model {source} is a {config.model_type!r} model; it must be one of a pretext task "
        f"({', '.join(pretext_tasks())}). To put the head of a pretext task on it pass it as --backbone."
    )


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
        model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=False)
        with_finite_weights(model, source)
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
    keep_head: bool = field(
        default=False, metadata={"help": "Keep the head of the classifier; else it gets a new one."}
    )


def classifier_builder(
    arguments: StartArguments, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL
) -> Callable[[], PreTrainedModel]:
    """Returns a function that builds the classifier to fine-tune; the weights are read once, and a new head is drawn
    from torch's random state at each call.

    Args:
        arguments ([`StartArguments`])
        class_names (`Sequence[str]`): of the data set.
        problem_type (`str`, *optional*): whether an image has one class or may have several.

    Raises:
        `ValueError`: if the arguments contradict each other, or the model does not fit.
    """
    if arguments.model_init not in ("pretrained", "random"):
        raise ValueError(f"model_init is {arguments.model_init!r}; it must be pretrained or random.")
    if arguments.keep_head:
        if arguments.model is None or arguments.model_init == "random":
            raise ValueError("keep_head is true; it needs a model with pretrained weights.")
        whole = _load_whole(arguments.model, class_names, problem_type)
        return lambda: copy.deepcopy(whole)
    if arguments.model is None or arguments.model_init == "random":
        config = _backbone_config(arguments.model)
        return lambda: new_classifier(config, class_names, problem_type=problem_type)
    backbone = _load_backbone(arguments.model)
    return lambda: classifier_on(backbone, class_names, problem_type=problem_type)


def _backbone_config(source: str | None) -> PretrainedConfig:
    config: Any = load_config("model", source) if source else resnet18_config()
    if isinstance(config, BiSSLConfig):
        return config.upper_config
    return config.backbone_config if config.model_type in PRETEXT_MODELS else config


def _load_backbone(source: str) -> PreTrainedModel:
    config = load_config("model", source)
    with loading("model", source):
        if isinstance(config, BiSSLConfig):
            return with_finite_weights(BiSSLModel.from_pretrained(source), source).aligned_model().base_model
        return load_backbone(source)


def _load_whole(source: str, class_names: Sequence[str], problem_type: str) -> PreTrainedModel:
    config = load_config("model", source)
    if isinstance(config, BiSSLConfig) or config.model_type in PRETEXT_MODELS:
        raise ValueError(
            f"model {source} is a {config.model_type!r} model, which is no image classifier; leave keep_head out."
        )
    return load_classifier(source, class_names, field="model", problem_type=problem_type)
