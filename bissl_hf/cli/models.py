"""The models of a run, from what its arguments name."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForImageClassification, PretrainedConfig, PreTrainedModel

from ..evaluation.metrics import SINGLE_LABEL
from ..models.backbone import load_backbone
from ..models.configuration_backbone import resnet18_config
from ..models.configuration_bissl import BiSSLConfig
from ..models.configuration_simclr import SimCLRConfig
from ..models.finite import with_finite_weights
from ..models.modeling_bissl import BiSSLModel
from ..models.modeling_simclr import SimCLRForPreTraining
from .loading import load_config, loading


@dataclass
class PretextModelArguments:
    """Where the pretext model comes from."""

    lower_model: str | None = field(default=None, metadata={"help": "Pre-trained SimCLR model: a folder or Hub id."})
    backbone: str | None = field(
        default=None, metadata={"help": "Backbone to start from: a folder or Hub id; a ResNet-18 if not given."}
    )
    backbone_init: str = field(
        default="pretrained",
        metadata={"help": "pretrained: load --backbone's weights; random: its architecture only."},
    )
    projection_dims: list[int] = field(
        default_factory=lambda: [256, 256, 256], metadata={"help": "Widths of the projection head."}
    )
    temperature: float = field(default=0.5, metadata={"help": "Temperature of the NT-Xent loss."})

    def loaded_models(self) -> list[str]:
        """Returns the models, as the user named them, whose weights training starts from."""
        backbone = self.backbone if self.backbone_init == "pretrained" else None
        return [name for name in (self.lower_model, backbone) if name]


def build_pretext_model(arguments: PretextModelArguments) -> SimCLRForPreTraining:
    """Returns the SimCLR model that the arguments name: loaded whole, or a new head on a backbone.

    Raises:
        `ValueError`: if the arguments contradict each other or name another kind of model.
    """
    heads: dict[str, Any] = {"projection_dims": arguments.projection_dims, "temperature": arguments.temperature}
    if arguments.backbone_init not in ("pretrained", "random"):
        raise ValueError(f"backbone_init is {arguments.backbone_init!r}; it must be pretrained or random.")
    if arguments.lower_model and arguments.backbone:
        raise ValueError("Both lower_model and backbone are given; a lower model brings its backbone, so drop one.")
    if arguments.lower_model:
        return _load_simclr(arguments.lower_model)
    if arguments.backbone and arguments.backbone_init == "pretrained":
        with loading("backbone", arguments.backbone):
            backbone = load_backbone(arguments.backbone)
        return SimCLRForPreTraining.from_backbone(backbone, **heads)
    config = load_config("backbone", arguments.backbone) if arguments.backbone else resnet18_config()
    return SimCLRForPreTraining(SimCLRConfig(backbone_config=config, **heads))


def _load_simclr(source: str) -> SimCLRForPreTraining:
    config = load_config("lower_model", source)
    if not isinstance(config, SimCLRConfig):
        raise ValueError(
            f"lower_model {source} is a {config.model_type!r} model; it must be a SimCLR one. To put a SimCLR head on "
            "it pass it as --backbone."
        )
    with loading("lower_model", source):
        return with_finite_weights(SimCLRForPreTraining.from_pretrained(source), source)


def new_classifier(
    backbone_config: PretrainedConfig, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL
) -> PreTrainedModel:
    """Returns the image classifier on this kind of backbone with new weights and a head for these classes."""
    config: Any = type(backbone_config).from_dict(backbone_config.to_dict())
    config.problem_type = problem_type
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    return AutoModelForImageClassification.from_config(config)


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
        `ValueError`: if it tells other classes apart, or the same in another order.
    """
    with loading(field, source):
        model = AutoModelForImageClassification.from_pretrained(source, trust_remote_code=False)
        with_finite_weights(model, source)
    if model.config.num_labels != len(class_names):
        raise ValueError(
            f"{field} {source} tells {model.config.num_labels} classes apart and the data set has "
            f"{len(class_names)}; leave {field} out for a new head."
        )
    names = [model.config.id2label[number] for number in range(len(class_names))]
    if sorted(names) == sorted(class_names) and names != list(class_names):
        raise ValueError(
            f"{field} {source} has the classes of the data set in another order ({', '.join(names[:4])}, ... instead "
            f"of {', '.join(class_names[:4])}, ...), which its head cannot follow; leave {field} out for a new head."
        )
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: number for number, name in enumerate(class_names)}
    model.config.problem_type = problem_type
    return model


@dataclass
class StartArguments:
    """What fine-tuning starts from."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "What to fine-tune: an image classifier, a backbone, a SimCLR model or the output of BiSSL, as a "
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


def classifier_on(
    backbone: PreTrainedModel, class_names: Sequence[str], *, problem_type: str = SINGLE_LABEL
) -> PreTrainedModel:
    """Returns a classifier with a new head and the weights of a backbone, which are copied.

    Raises:
        `ValueError`: if the backbone lacks weights that the classifier has.
    """
    model = new_classifier(backbone.config, class_names, problem_type=problem_type)
    weights = backbone.state_dict()
    missing = [name for name in model.base_model.state_dict() if name not in weights]
    if missing:
        raise ValueError(
            f"The backbone, a {type(backbone).__name__}, lacks {len(missing)} of the weights of "
            f"{type(model).__name__}: {', '.join(missing[:5])}."
        )
    # A base model may hold more than its classifier uses: the pooler of a ViT.
    model.base_model.load_state_dict(weights, strict=False)
    return model


def _backbone_config(source: str | None) -> PretrainedConfig:
    config: Any = load_config("model", source) if source else resnet18_config()
    if isinstance(config, BiSSLConfig):
        return config.upper_config
    return config.backbone_config if isinstance(config, SimCLRConfig) else config


def _load_backbone(source: str) -> PreTrainedModel:
    config = load_config("model", source)
    with loading("model", source):
        if isinstance(config, BiSSLConfig):
            return with_finite_weights(BiSSLModel.from_pretrained(source), source).aligned_model().base_model
        return load_backbone(source)


def _load_whole(source: str, class_names: Sequence[str], problem_type: str) -> PreTrainedModel:
    config = load_config("model", source)
    if isinstance(config, SimCLRConfig | BiSSLConfig):
        raise ValueError(
            f"model {source} is a {config.model_type!r} model, which is no image classifier; leave keep_head out."
        )
    return load_classifier(source, class_names, field="model", problem_type=problem_type)
