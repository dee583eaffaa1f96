"""Backbones of vision models: which module it is, built, loaded, copied, and its features.

The backbone of most models of transformers is their `base_model`. There are two exceptions. The `base_model` of a
DINOv3 model is its encoder, though the embeddings and the last norm belong to the backbone. The one of a classifier of
timm is a module of timm with the classifier in it, which does not belong to it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    TimmWrapperConfig,
)

from . import modeling_dinov3  # noqa: F401  makes its classifiers known to the Auto classes
from .auto import PRETEXT_MODELS, pretext_class
from .configuration_backbone import num_channels, own_image_size
from .finite import with_finite_weights
from .loading import load_config, load_pretrained, load_without_head

_USUAL_IMAGE_SIZE = 224
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding")


def backbone_model(model: PreTrainedModel) -> Any:
    """Returns the backbone of a model with its forward pass: the model itself if it is one, else its base model."""
    classes = MODEL_MAPPING.get(type(model.config), ())
    return model if type(model) in (classes if isinstance(classes, tuple) else (classes,)) else model.base_model


def backbone_of(model: PreTrainedModel) -> Any:
    """Returns the module below which the parameters of a backbone have the same names in all models on it."""
    backbone = backbone_model(model)
    return backbone.timm_model if isinstance(getattr(backbone, "config", None), TimmWrapperConfig) else backbone


def backbone_prefix(model: Any) -> str:
    """Returns what is before the names of the backbone's parameters in those of the whole model: `"resnet."`, or
    nothing."""
    backbone = backbone_of(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is backbone)


def backbone_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Returns the parameters of the backbone by their names below `backbone_of(model)`; a classifier in it is left
    out."""
    backbone = backbone_of(model)
    heads = {id(parameter) for head in _classifiers_in(backbone) for parameter in head.parameters()}
    return {name: parameter for name, parameter in backbone.named_parameters() if id(parameter) not in heads}


def backbone_and_heads(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the trainable parameters of the backbone of a model, and the others."""
    backbone = {id(parameter) for parameter in backbone_parameters(model).values()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trainable if id(p) in backbone], [p for p in trainable if id(p) not in backbone]


def _classifiers_in(backbone: Any) -> list[nn.Module]:
    """Returns the classifiers inside a module of timm; those with a distillation token have two."""
    if isinstance(backbone, PreTrainedModel) or not hasattr(backbone, "get_classifier"):
        return []
    found = backbone.get_classifier()
    return [head for head in (found if isinstance(found, tuple) else (found,)) if isinstance(head, nn.Module)]


def _classifies_images(config: PretrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and not isinstance(config, TimmWrapperConfig)


def build_backbone(config: PretrainedConfig) -> PreTrainedModel:
    """Builds the base model of the image classifier of this configuration, so that both hold the same parameters: a
    ViT classifier, say, has no pooler while a plain `ViTModel` has one. Its dtype is torch's default, as the head's
    is, whatever the configuration of a checkpoint in half precision says."""
    if _classifies_images(config):
        return AutoModelForImageClassification.from_config(config, dtype=torch.get_default_dtype()).base_model
    return AutoModel.from_config(config, dtype=torch.get_default_dtype())


def load_backbone(source: str | PreTrainedModel) -> Any:
    """Returns the backbone behind a folder, a Hub id or a model. Weights from a checkpoint have torch's default dtype,
    those of a model their own.

    Raises:
        `ValueError`: if weights of the backbone are missing or not finite.
    """
    if isinstance(source, PreTrainedModel):
        backbone = backbone_model(with_finite_weights(source, f"the {type(source).__name__}"))
        if isinstance(backbone, PreTrainedModel):
            return backbone
        built: Any = build_backbone(source.config)
        built.to(device=source.device, dtype=source.dtype)
        copy_backbone(source, built)
        return built
    config = load_config(source)
    if config.model_type in PRETEXT_MODELS:
        return load_pretrained(pretext_class(config.model_type), source).backbone
    model, missing = load_without_head(
        AutoModelForImageClassification if _classifies_images(config) else AutoModel, source
    )
    prefix, own = backbone_prefix(model), set(backbone_of(model).state_dict())
    if lost := sorted(name for key in missing if (name := key.removeprefix(prefix)) in own):
        raise ValueError(f"{source} lacks {len(lost)} of the backbone's parameters: {', '.join(lost[:5])}.")
    return with_finite_weights(backbone_model(model), source)


@torch.no_grad()
def copy_backbone(source: PreTrainedModel, target: PreTrainedModel) -> None:
    """Copies the weights and buffers of the backbone of one model to that of another. The source may have more: the
    pooler of a ViT, which its classifier does not use.

    Raises:
        `ValueError`: if the source lacks some.
    """
    weights, module = backbone_of(source).state_dict(), backbone_of(target)
    heads = {id(parameter) for head in _classifiers_in(module) for parameter in head.parameters()}
    wanted = {name: value for name, value in module.state_dict(keep_vars=True).items() if id(value) not in heads}
    if missing := [name for name in wanted if name not in weights]:
        raise ValueError(
            f"The backbone, a {type(source).__name__}, lacks {len(missing)} of the parameters of "
            f"{type(target).__name__}: {', '.join(missing[:5])}."
        )
    module.load_state_dict({name: weights[name] for name in wanted}, strict=False)


# Features


def embed_images(model: Any, pixel_values: Tensor) -> Tensor:
    """Returns the features of images by the backbone of a model.

    Args:
        model (`PreTrainedModel`): a backbone, or a model on one.
        pixel_values (`torch.Tensor`): shape `(batch, channels, height, width)`.

    Returns:
        `torch.Tensor`: shape `(batch, width)`.
    """
    backbone = backbone_of(model)
    if not isinstance(backbone, PreTrainedModel):  # of timm
        return backbone.forward_head(backbone.forward_features(pixel_values), pre_logits=True).flatten(1)
    return pool_features(backbone(pixel_values=pixel_values), class_token=has_class_token(backbone))


def has_class_token(backbone: nn.Module) -> bool:
    """Whether the first token of a sequence stands for the whole image."""
    return any(name.endswith(_CLASS_TOKENS) for name, _ in backbone.named_parameters())


def pool_features(outputs: Any, *, class_token: bool) -> Tensor:
    """Returns one feature vector per image, shape `(batch, width)`, from the outputs of a backbone: those that it
    pooled itself, else the class token of a sequence that has one, else the mean over a sequence or a map."""
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = outputs.last_hidden_state
    if hidden.ndim == 3:  # (batch, tokens, width)
        return hidden[:, 0] if class_token else hidden.mean(dim=1)
    return hidden.mean(dim=(2, 3))


# By the JSON of a configuration: a trial pass takes up to a second, and configurations are made often.
_feature_sizes: dict[str, int] = {}


def infer_feature_size(config: PretrainedConfig) -> int:
    """Returns the width of a backbone's features, by a trial pass.

    Raises:
        `ValueError`: if the pass fails.
    """
    key = config.to_json_string(use_diff=False)
    if key not in _feature_sizes:
        _feature_sizes[key] = features_of_one_image(config, _image_size_to_try(config)).shape[1]
    return _feature_sizes[key]


def _image_size_to_try(config: PretrainedConfig) -> int:
    return own_image_size(config) or _USUAL_IMAGE_SIZE


def features_of_one_image(config: PretrainedConfig, image_size: int) -> Tensor:
    """Passes an image through a backbone of this configuration on torch's meta device: without weights and numbers.

    Raises:
        `ValueError`: if the backbone does not take it.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            image = torch.zeros(1, num_channels(config), image_size, image_size)
            features = embed_images(build_backbone(config).eval(), image)
    except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"A {config.model_type!r} backbone does not turn an image of {image_size} x {image_size} pixels into "
            f"features: {reason}"
        ) from error
    return features
