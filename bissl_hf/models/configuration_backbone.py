"""Configurations of backbones: objects or their dictionaries, and the width of the features."""

from typing import Any

from transformers import AutoConfig, PretrainedConfig, ResNetConfig


def resnet18_config() -> ResNetConfig:
    """Returns the configuration of a ResNet-18 (He et al., arXiv 1512.03385)."""
    return ResNetConfig(embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")


def as_config(config: PretrainedConfig | dict[str, Any]) -> PretrainedConfig:
    """Returns a configuration object for what may be its dictionary."""
    if isinstance(config, dict):
        settings = dict(config)
        if "model_type" not in settings:
            raise ValueError(
                "The configuration of a sub-model has no `model_type`; it must name one of transformers' types."
            )
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"The configuration of a sub-model is a {type(config).__name__}; it must be a PretrainedConfig or a dict."
        )
    return config


def infer_feature_size(config: PretrainedConfig) -> int:
    """Returns the width of a backbone's features from its configuration.

    Raises:
        `ValueError`: if the configuration does not say.
    """
    sizes = getattr(config, "hidden_sizes", None)
    size = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"The configuration of a {config.model_type!r} backbone has neither hidden_sizes nor hidden_size; pass "
            "feature_size."
        )
    return size
