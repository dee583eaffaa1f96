"""Configuration of SimCLR pre-training."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .configuration_pretext import PretextConfig


class SimCLRConfig(PretextConfig):
    """Configuration of [`SimCLRForPreTraining`].

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): any vision model; a ResNet-18 if not given.
        projection_dims (`Sequence[int]`, *optional*, defaults to `(256, 256, 256)`): widths of the projection head.
        temperature (`float`, *optional*, defaults to 0.5): of the NT-Xent loss.
        feature_size (`int`, *optional*): width of the backbone's features; found by a trial pass if not given.

    Raises:
        `ValueError`: for a temperature or width that is not positive, or a feature size that cannot be found.
    """

    model_type = "simclr"

    temperature: float = 0.5

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dims: Sequence[int] = (256, 256, 256),
        temperature: float = 0.5,
        feature_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be above 0 and finite.")
        super().__init__(backbone_config, projection_dims, feature_size, **kwargs)
        self.temperature = temperature


AutoConfig.register("simclr", SimCLRConfig)
