"""Usual settings of the optimizers by family of backbone.

Convolutional networks with batch norm keep the paper's: LARS below and SGD above. Everything else (transformers, and
ConvNeXt, which is trained as they are) gets AdamW, as in the recipes that their authors published.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

from ..models.configuration_backbone import backbone_config

# Model types of transformers, and beginnings of timm's architectures.
BATCH_NORM_NETWORKS = (
    "resnet", "resnext", "wide_resnet", "seresnet", "regnet", "efficientnet", "mobilenet", "densenet", "vgg",
    "resnetv2", "test_resnet",
)  # fmt: skip

# Fields of BiSSLTrainingArguments. The paper's (arXiv 2410.02387, appendix), which are their defaults.
PAPER: Mapping[str, Any] = MappingProxyType(
    {
        "optim": "sgd",
        "learning_rate": 0.015,
        "weight_decay": 0.01,
        "lower_optim": "lars",
        "lower_learning_rate": 1.0,
        "lower_weight_decay": 1e-6,
    }
)
# Common starting points for going on from pre-trained weights; neither searched nor measured here.
ADAMW: Mapping[str, Any] = MappingProxyType(
    {
        "optim": "adamw",
        "learning_rate": 5e-5,
        "weight_decay": 0.05,
        "lower_optim": "adamw",
        "lower_learning_rate": 1e-4,
        "lower_weight_decay": 0.05,
    }
)


def optimizer_preset(config: PretrainedConfig) -> dict[str, Any]:
    """Returns the usual settings of both levels' optimizers for a backbone.

    Args:
        config (`PretrainedConfig`): of the backbone, or of a pretext model on one.

    Returns:
        `dict[str, Any]`: values by the names of fields of [`BiSSLTrainingArguments`].

    Example:

    ```python
    >>> from transformers import Dinov2Config, ResNetConfig
    >>> from bissl_hf.optim.presets import optimizer_preset
    >>> optimizer_preset(ResNetConfig())["lower_optim"], optimizer_preset(Dinov2Config())["lower_optim"]
    ('lars', 'adamw')
    ```
    """
    backbone = backbone_config(config)
    name = getattr(backbone, "architecture", None) or backbone.model_type
    return dict(PAPER if name.startswith(BATCH_NORM_NETWORKS) else ADAMW)
