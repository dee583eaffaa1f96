"""Configuration of Barlow Twins pre-training."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .configuration_pretext import PretextConfig, check_weights


class BarlowTwinsConfig(PretextConfig):
    """Configuration of [`BarlowTwinsForPreTraining`]. Widths are those of the paper (Zbontar et al., arXiv 2103.03230,
    section 2.2), the weight is that of its published code (the text rounds it to 0.005).

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): any vision model; a ResNet-18 if not given.
        projection_dims (`Sequence[int]`, *optional*, defaults to `(8192, 8192, 8192)`): widths of the projector.
        redundancy_weight (`float`, *optional*, defaults to 0.0051): lambda of the paper.
        feature_size (`int`, *optional*): width of the backbone's features; found by a trial pass if not given.

    Raises:
        `ValueError`: for a negative weight, a width that is not positive, or a feature size that cannot be found.
    """

    model_type = "barlow_twins"

    projection_dims: Any = (8192, 8192, 8192)
    redundancy_weight: float = 0.0051

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dims: Sequence[int] = (8192, 8192, 8192),
        redundancy_weight: float = 0.0051,
        feature_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_weights(redundancy_weight=redundancy_weight)
        super().__init__(backbone_config, projection_dims, feature_size, **kwargs)
        self.redundancy_weight = redundancy_weight


AutoConfig.register("barlow_twins", BarlowTwinsConfig)
