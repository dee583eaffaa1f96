"""What the configurations of the pretext models have in common: a backbone and the widths of a projection head."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .backbone import infer_feature_size
from .configuration_backbone import as_config, resnet18_config


class PretextConfig(PretrainedConfig):
    """Configuration of a [`PretextModel`]. A subclass adds the settings of its loss.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): any vision model; a ResNet-18 if not given.
        projection_dims (`Sequence[int]`, *optional*, defaults to `(256, 256, 256)`): widths of the projection head.
        feature_size (`int`, *optional*): width of the backbone's features; found by a trial pass if not given.

    Raises:
        `ValueError`: for a width that is not positive, or a feature size that cannot be found.
    """

    sub_configs: ClassVar[dict[str, Any]] = {"backbone_config": AutoConfig}
    has_no_defaults_at_init = False

    backbone_config: Any = None
    projection_dims: Any = (256, 256, 256)
    feature_size: Any = None

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dims: Sequence[int] = (256, 256, 256),
        feature_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_widths(projection_dims=projection_dims)
        backbone = as_config(backbone_config) if backbone_config is not None else resnet18_config()
        # The base class resets the attention of the sub-configurations it finds, so they are set after it.
        super().__init__(**kwargs)
        self.backbone_config = backbone
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]
        self.projection_dims = list(projection_dims)
        self.feature_size = feature_size or infer_feature_size(backbone)


def check_widths(**widths: Sequence[int]) -> None:
    """Refuses widths of a head that are not above 0, or none; a `ValueError` names the argument."""
    for name, values in widths.items():
        if not values or min(values) < 1:
            raise ValueError(f"{name} is {values}; it must hold at least one width, each above 0.")


def check_weights(**weights: float) -> None:
    """Refuses weights of the terms of a loss that are negative or not finite; a `ValueError` names the argument."""
    for name, value in weights.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be a number of at least 0.")
