"""Configuration of SimCLR pre-training."""

from collections.abc import Sequence
from typing import Any, ClassVar

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


class SimCLRConfig(PretrainedConfig):
    """Configuration of [`SimCLRForPreTraining`].

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): any vision model; a ResNet-18 if not given.
        projection_dims (`Sequence[int]`, *optional*, defaults to `(256, 256, 256)`): widths of the projection head.
        temperature (`float`, *optional*, defaults to 0.5): of the NT-Xent loss.
        feature_size (`int`, *optional*): width of the backbone's features; read from its configuration if not given.

    Raises:
        `ValueError`: for a temperature or width that is not positive, or a feature size that cannot be found.
    """

    model_type = "simclr"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    has_no_defaults_at_init = False

    backbone_config: Any = None
    projection_dims: Any = (256, 256, 256)
    temperature: float = 0.5
    feature_size: Any = None

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dims: Sequence[int] = (256, 256, 256),
        temperature: float = 0.5,
        feature_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0.")
        if not projection_dims or min(projection_dims) < 1:
            raise ValueError(f"projection_dims is {projection_dims}; it must hold at least one width, each above 0.")
        backbone = as_config(backbone_config) if backbone_config is not None else resnet18_config()
        # The base class resets the attention of the sub-configurations it finds, so they are set after it.
        super().__init__(**kwargs)
        self.backbone_config = backbone
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]
        self.projection_dims = list(projection_dims)
        self.temperature = temperature
        self.feature_size = feature_size or infer_feature_size(backbone)


def infer_feature_size(config: PretrainedConfig) -> int:
    """Returns the width of a backbone's features from its configuration.

    Raises:
        `ValueError`: if the configuration does not tell.
    """
    sizes = getattr(config, "hidden_sizes", None)
    size = sizes[-1] if sizes else getattr(config, "hidden_size", None)
    if not isinstance(size, int):
        raise ValueError(
            f"The configuration of a {config.model_type!r} backbone has neither hidden_sizes nor hidden_size; pass "
            "feature_size."
        )
    return size


AutoConfig.register("simclr", SimCLRConfig)
