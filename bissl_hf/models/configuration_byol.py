"""Configuration of BYOL pre-training."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from .configuration_pretext import PretextConfig, check_widths

EMA_SCHEDULES = ("constant", "cosine")


class BYOLConfig(PretextConfig):
    """Configuration of [`BYOLForPreTraining`]. The defaults are the settings with which BiSSL was tried on BYOL (arXiv
    2410.02387, later versions); BYOL's own paper (Grill et al., arXiv 2006.07733, section 3.3) has widths of 4096 and
    256 for both heads and lets the decay grow from 0.996 to 1 by a cosine.

    Args:
        backbone_config (`PretrainedConfig` or `dict`, *optional*): any vision model; a ResNet-18 if not given.
        projection_dims (`Sequence[int]`, *optional*, defaults to `(256, 256, 256)`): widths of the projector.
        predictor_dims (`Sequence[int]`, *optional*, defaults to `(256, 256, 256)`): widths of the predictor; the last
            is that of `projection_dims`.
        ema_decay (`float`, *optional*, defaults to 0.9995): tau of the paper, the target's share that a step keeps; at
            the start if it grows.
        ema_schedule (`str`, *optional*, defaults to `"constant"`): or `"cosine"`, which lets the decay grow to 1 at
            the last step.
        feature_size (`int`, *optional*): width of the backbone's features; found by a trial pass if not given.

    Raises:
        `ValueError`: for a decay outside 0 to 1, an unknown schedule, widths that are not positive or do not fit, or a
            feature size that cannot be found.
    """

    model_type = "byol"

    predictor_dims: Any = (256, 256, 256)
    ema_decay: float = 0.9995
    ema_schedule: str = "constant"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        projection_dims: Sequence[int] = (256, 256, 256),
        predictor_dims: Sequence[int] = (256, 256, 256),
        ema_decay: float = 0.9995,
        ema_schedule: str = "constant",
        feature_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        check_widths(projection_dims=projection_dims, predictor_dims=predictor_dims)
        if predictor_dims[-1] != projection_dims[-1]:
            raise ValueError(
                f"predictor_dims ends with {predictor_dims[-1]} and projection_dims with {projection_dims[-1]}; a "
                "prediction must be as wide as the projection that it predicts."
            )
        if not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay is {ema_decay}; it must be between 0 and 1.")
        if ema_schedule not in EMA_SCHEDULES:
            raise ValueError(f"ema_schedule is {ema_schedule!r}; it must be one of {', '.join(EMA_SCHEDULES)}.")
        super().__init__(backbone_config, projection_dims, feature_size, **kwargs)
        self.predictor_dims = list(predictor_dims)
        self.ema_decay = ema_decay
        self.ema_schedule = ema_schedule


AutoConfig.register("byol", BYOLConfig)
