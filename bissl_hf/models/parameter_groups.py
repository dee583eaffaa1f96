"""Learning rates of their own for parts of a model."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .backbone import backbone_parameters


def backbone_and_head_groups(model: PreTrainedModel, *, head_learning_rate: float) -> list[dict[str, Any]]:
    """Returns the trainable parameters of a model in groups for an optimizer: those of its backbone, which take the
    optimizer's learning rate, and those of its heads (such as the decoder of a ViT-MAE) with a learning rate of their
    own. A schedule that multiplies the learning rate of each group, as those of torch do, serves both.

    Args:
        model (`PreTrainedModel`): a tensor of a head that is tied to the base model counts as part of the latter.
        head_learning_rate (`float`): at least 0.

    Returns:
        `list[dict]`: one or two groups with `params`; the second has `lr`. A group without parameters is left out.

    Raises:
        `ValueError`: for a negative learning rate.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from bissl_hf.models.parameter_groups import backbone_and_head_groups
    >>> model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[4], depths=[1], layer_type="basic"))
    >>> optimizer = torch.optim.SGD(backbone_and_head_groups(model, head_learning_rate=1e-4), lr=0.01)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.01, 0.0001]
    ```
    """
    if not head_learning_rate >= 0:
        raise ValueError(f"head_learning_rate is {head_learning_rate}; it must be at least 0.")
    backbone, heads = backbone_and_heads(model)
    groups: list[dict[str, Any]] = [{"params": backbone}, {"params": heads, "lr": head_learning_rate}]
    return [group for group in groups if group["params"]]


def backbone_and_heads(model: PreTrainedModel) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the trainable parameters of the backbone of a model, and the others."""
    backbone = {id(parameter) for parameter in backbone_parameters(model).values()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [p for p in trainable if id(p) in backbone], [p for p in trainable if id(p) not in backbone]
