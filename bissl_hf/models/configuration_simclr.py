"""Configuration of SimCLR pre-training."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .configuration_backbone import as_config, infer_feature_size, resnet18_config


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


AutoConfig.register("simclr", SimCLRConfig)
