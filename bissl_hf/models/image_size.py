"""Backbones for images of another size than that of their pre-training."""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..data.preprocessing import Preprocessing, load_preprocessing
from .backbone import build_backbone, features_of_one_image
from .configuration_backbone import backbone_config, own_image_size


def adapt_image_size(model: PreTrainedModel, image_size: int, *, field: str = "image_size") -> PreTrainedModel:
    """Returns a model for images of this size: the model itself where it takes them, else, for a ViT, a new one whose
    position embeddings are interpolated. So the exported model takes images of the new size without further ado.

    Args:
        model (`PreTrainedModel`): a backbone, or a model on one.
        image_size (`int`): side of the square images, in pixels.
        field (`str`, *optional*): the argument that says it, for messages.

    Raises:
        `ValueError`: if the model does not take this size and cannot be made to, or its patches do not divide it.
    """
    config = backbone_config(model.config)
    own = own_image_size(config)
    if own == image_size:
        return model
    _check_patches(model, config, image_size, field)
    reason = _why_not(config, image_size)
    if reason is None:
        return model
    tables = _position_tables(model)
    if not tables:
        raise ValueError(
            f"{field} is {image_size}, and the {config.model_type} backbone does not take images of this size"
            f"{f': it was made for {own}' if own else ''}. Set {field} to {own or 'its own size'}, or choose another "
            f"backbone. ({reason})"
        )
    return _with_positions(model, tables, image_size)


def own_preprocessing(source: str, config: PretrainedConfig, *, image_size: int | None = None) -> Preprocessing:
    """Returns how images are prepared for a model: as its image processor or its configuration of timm says, else with
    ImageNet's mean and deviation. The size that none of them names is that of its configuration, if it has one.

    Args:
        source (`str`): folder or Hub id of the model.
        config (`PretrainedConfig`): of the model, or of its backbone.
        image_size (`int`, *optional*): side of the images, in pixels, in place of the one that is found.

    Raises:
        `ValueError`: see [`Preprocessing.from_processor`].
    """
    found = load_preprocessing(source, image_size=image_size) or Preprocessing(image_size=image_size)
    return found if found.image_size else replace(found, image_size=own_image_size(backbone_config(config)))


def config_for_image_size(config: PretrainedConfig, image_size: int, *, field: str = "image_size") -> PretrainedConfig:
    """Returns the configuration of a backbone with new weights for images of this size.

    Args:
        config (`PretrainedConfig`)
        image_size (`int`): side of the square images, in pixels.
        field (`str`, *optional*): the argument that says it, for messages.

    Raises:
        `ValueError`: if such a backbone does not take this size, or its patches do not divide it.
    """
    changed: Any = copy.deepcopy(config)
    if getattr(changed, "image_size", None) is not None:
        changed.image_size = image_size
    with torch.device("meta"):
        _check_patches(build_backbone(changed), changed, image_size, field)
    if reason := _why_not(changed, image_size):
        raise ValueError(f"{field} is {image_size}; choose another one, or another backbone. ({reason})")
    return changed


def _check_patches(model: PreTrainedModel, config: PretrainedConfig, image_size: int, field: str) -> None:
    """Refuses a size that leaves part of a patch over, which most models would leave out without a word."""
    patch = getattr(config, "patch_size", None)
    pads = any(hasattr(module, "maybe_pad") for module in model.modules())  # as Swin does
    if isinstance(patch, int) and not pads and image_size % patch:
        below = image_size // patch * patch
        near = f"{below} or {below + patch}" if below else f"{patch}"
        raise ValueError(
            f"{field} is {image_size}, which the patches of the {config.model_type} backbone, {patch} pixels wide, do "
            f"not divide; choose {near}."
        )


def _why_not(config: PretrainedConfig, image_size: int) -> str | None:
    """Returns why a backbone of this configuration does not take images of this size; `None` if it does."""
    try:
        features_of_one_image(config, image_size)
    except ValueError as error:
        return str(error)
    return None


def _position_tables(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the modules that can interpolate their position embeddings, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "position_embeddings", None), nn.Parameter)
        and hasattr(module, "interpolate_pos_encoding")
    }


@torch.no_grad()
def _with_positions(model: PreTrainedModel, tables: dict[str, Any], image_size: int) -> PreTrainedModel:
    """Builds the model anew for another size, with its weights and interpolated position embeddings."""
    config = copy.deepcopy(model.config)
    inner: Any = backbone_config(config)
    inner.image_size = image_size
    resized: Any = type(model)(config)
    for name, _ in list(resized.named_children()):
        if getattr(model, name) is None:  # the pooler, which the backbone of a classifier does not have
            setattr(resized, name, None)
    resized.to(device=model.device, dtype=model.dtype)
    weights = model.state_dict()
    for name, module in tables.items():
        weights[f"{name}.position_embeddings".lstrip(".")] = _interpolated(module, image_size, inner.patch_size)
    shapes = {name: value.shape for name, value in resized.state_dict().items()}
    if other := [name for name, value in weights.items() if shapes.get(name) != value.shape]:
        raise ValueError(
            f"The {type(model).__name__} is for images of {own_image_size(backbone_config(model.config))} pixels, and "
            f"{', '.join(other[:3])} cannot be interpolated to {image_size}; start from its backbone instead."
        )
    resized.load_state_dict(weights)
    for parameter, source in zip(resized.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(source.requires_grad)
    return resized.train(model.training)


def _interpolated(module: Any, image_size: int, patch_size: int) -> Tensor:
    """Returns the position embeddings of a module for square images of another size."""
    tokens = 1 + (image_size // patch_size) ** 2
    width = module.position_embeddings.shape[-1]
    return module.interpolate_pos_encoding(torch.empty(1, tokens, width, device="meta"), image_size, image_size)
