"""Configuration of VICReg pre-training."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .configuration_pretext import PretextConfig, check_weights


class VICRegConfig(PretextConfig):
    """Configuration of [`VICRegForPreTraining`]. Widths and weights are those of the paper (Bardes et al.,
    arXiv 2105.04906, section 4.2).

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): any vision model; a ResNet-18 if not given.
        projection_dims (`Sequence[int]`, *optional*, defaults to `(8192, 8192, 8192)`): widths of the expander.
        invariance_weight (`float`, *optional*, defaults to 25.0): lambda of the paper.
        variance_weight (`float`, *optional*, defaults to 25.0): mu of the paper.
        covariance_weight (`float`, *optional*, defaults to 1.0): nu of the paper.
        feature_size (`int`, *optional*): width of the backbone's features; found by a trial pass if not given.

    Raises:
        `ValueError`: for a negative weight, a width that is not positive, or a feature size that cannot be found.
    """

    model_type = "vicreg"

    projection_dims: Any = (8192, 8192, 8192)
    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dims: Sequence[int] = (8192, 8192, 8192),
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        feature_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_weights(
            invariance_weight=invariance_weight, variance_weight=variance_weight, covariance_weight=covariance_weight
        )
        super().__init__(backbone_config, projection_dims, feature_size, **kwargs)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight


AutoConfig.register("vicreg", VICRegConfig)
