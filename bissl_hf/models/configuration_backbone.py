"""Configurations of backbones: objects or their dictionaries, and the images that they are for."""

from collections.abc import Sequence
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, ResNetConfig


def resnet18_config() -> ResNetConfig:
    """Returns the configuration of a ResNet-18 (He et al., arXiv 1512.03385)."""
    return ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")


def as_config(config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
    """Returns a configuration object for what may be its dictionary."""
    if isinstance(config, dict):
        model_type = config.get("model_type")
        if model_type is None:
            raise ValueError(
                "The configuration of a sub-model has no `model_type`; it must name one of transformers' types."
            )
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"The model_type of a sub-model is {model_type!r}, which transformers does not know.")
        # Not by its constructor: a configuration of timm has its labels under another name.
        return CONFIG_MAPPING[model_type].from_dict(config)
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"The configuration of a sub-model is a {type(config).__name__}; it must be a PretrainedConfig or a dict."
        )
    return config


def backbone_config(config: PretrainedConfig) -> Any:
    """Returns the configuration of the backbone in that of a model, in a model of both levels that of the upper one; a
    backbone's is its own."""
    config = getattr(config, "upper_config", None) or config
    return getattr(config, "backbone_config", None) or config


def num_channels(config: PretrainedConfig) -> int:
    """Returns the channels of the images that a backbone takes; 3 if its configuration does not say."""
    settings, (channels, *_) = _timm_settings(config)
    return int(getattr(config, "num_channels", None) or settings.get("in_chans") or channels)


def own_image_size(config: PretrainedConfig) -> int | None:
    """Returns the side of the images that a backbone was made for, in pixels; `None` if its configuration does not
    say, or the images are not square."""
    settings, shape = _timm_settings(config)
    size = getattr(config, "image_size", None) or settings.get("img_size") or shape[1]
    sides = {size} if isinstance(size, int) else set(size or ())
    return sides.pop() if len(sides) == 1 else None


def _timm_settings(config: PretrainedConfig) -> tuple[dict[str, Any], Sequence[Any]]:
    """Returns the arguments of a model of timm, and the shape of its images: channels, height, width."""
    shape = (getattr(config, "pretrained_cfg", None) or {}).get("input_size", (3, None, None))
    return getattr(config, "model_args", None) or {}, shape
