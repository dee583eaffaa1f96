"""SimCLR (Chen et al., arXiv 2002.05709) on any vision backbone of transformers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from ..losses import nt_xent_from_similarities, nt_xent_loss, pair_similarities
from .backbone import build_backbone, load_backbone, pool_features
from .configuration_simclr import SimCLRConfig


@dataclass
class SimCLROutput(ModelOutput):
    """What SimCLR returns.

    Args:
        loss (`torch.Tensor`): NT-Xent loss, shape `()`.
        embeddings (`torch.Tensor`): of both views, shape `(batch, 2, projection_dims[-1])`.
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class SimCLRProjectionHead(nn.Sequential):
    """Linear, batch norm, ReLU, ..., and a last linear layer without bias (paper, section 4)."""

    def __init__(self, feature_size: int, dims: Sequence[int]) -> None:
        layers: list[nn.Module] = []
        width = feature_size
        for dim in dims[:-1]:
            layers += [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU()]
            width = dim
        super().__init__(*layers, nn.Linear(width, dims[-1], bias=False))


class SimCLRForPreTraining(PreTrainedModel):
    """A backbone with a projection head and the NT-Xent loss.

    Args:
        config ([`SimCLRConfig`])

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf import SimCLRConfig, SimCLRForPreTraining
    >>> model = SimCLRForPreTraining(SimCLRConfig())
    >>> model(pixel_values=torch.rand(4, 2, 3, 32, 32)).embeddings.shape
    torch.Size([4, 2, 256])
    ```
    """

    config_class = SimCLRConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.projection_head = SimCLRProjectionHead(config.feature_size, config.projection_dims)
        layers: list[Any] = list(self.projection_head)
        for layer in layers:
            # Its layers have drawn their weights by now, except on the meta device, where `from_pretrained` builds.
            layer._is_hf_initialized = all(not parameter.is_meta for parameter in layer.parameters())
        self.post_init()

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether the backbone does."""
        return bool(self.backbone.supports_gradient_checkpointing)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only the head is initialised here; the layers of the backbone by the backbone itself. Both are torch's
        # defaults (He for linear layers with the gain of their reset), as in the authors' SimCLR.
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        *,
        projection_dims: Sequence[int] = (256, 256, 256),
        temperature: float = 0.5,
        feature_size: int | None = None,
    ) -> "SimCLRForPreTraining":
        """Puts a new projection head on a backbone with its weights, which are copied.

        Args:
            backbone (`str` or `PreTrainedModel`): a folder, a Hub id, or a model (its base model counts).
            projection_dims, temperature, feature_size: see [`SimCLRConfig`].

        Raises:
            `ValueError`: if the backbone's weights are not all there.
        """
        source = load_backbone(backbone)
        if source.main_input_name != "pixel_values":
            raise ValueError(
                f"The backbone is a {type(source).__name__}, which takes {source.main_input_name}; SimCLR needs a "
                "vision model."
            )
        config = SimCLRConfig(
            backbone_config=copy.deepcopy(source.config),
            projection_dims=projection_dims,
            temperature=temperature,
            feature_size=feature_size,
        )
        model: Any = cls(config)
        model.to(device=source.device, dtype=source.dtype)
        weights = source.state_dict()
        missing = [name for name in model.backbone.state_dict() if name not in weights]
        if missing:
            raise ValueError(
                f"The backbone lacks {len(missing)} of the parameters of its architecture: {', '.join(missing[:5])}."
            )
        # A base model may hold more than its classifier uses: the pooler of a ViT.
        model.backbone.load_state_dict(weights, strict=False)
        return model

    def forward(self, pixel_values: Tensor, return_loss: bool = True, **kwargs: Any) -> SimCLROutput:
        """Embeds both views and compares them. The views pass one after the other, so that batch-norm statistics are
        taken per view (paper, section 4).

        Args:
            pixel_values (`torch.Tensor`): shape `(batch, 2, channels, height, width)`.
            return_loss (`bool`, *optional*, defaults to `True`): whether to compare the embeddings.

        Raises:
            `ValueError`: for another shape.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, 2, channels, height, width): "
                "two views."
            )
        embeddings = torch.stack([self.embed(pixel_values[:, view]) for view in range(2)], dim=1)
        return SimCLROutput(loss=self.loss_from_embeddings(embeddings) if return_loss else None, embeddings=embeddings)

    def loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the NT-Xent loss of embeddings `(batch, 2, projection_dims[-1])`, shape `()`. A model with this
        method and `return_loss` can be trained in parts with the loss of the whole batch (`lower_gradient_cache`)."""
        return nt_xent_loss(*embeddings.unbind(1), temperature=self.config.temperature)

    def outputs_for_loss(self, **inputs: Any) -> Tensor:
        """Returns the outputs in which the loss is convex, the similarities of all pairs of embeddings. A model with
        this method and `loss_from_outputs` has a Gauss-Newton matrix ([`bissl_hf.bilevel.gauss_newton`])."""
        return self.outputs_from_embeddings(self(**inputs, return_loss=False).embeddings)

    def outputs_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the same from embeddings `(batch, 2, projection_dims[-1])`, which may be made in parts."""
        return pair_similarities(*embeddings.unbind(1), temperature=self.config.temperature)

    def loss_from_outputs(self, outputs: Tensor, **inputs: Any) -> Tensor:
        """Returns the loss of `outputs_for_loss`, shape `()`."""
        return nt_xent_from_similarities(outputs)

    def embed(self, images: Tensor) -> Tensor:
        """Returns the embeddings of images `(batch, channels, height, width)`, shape `(batch,
        projection_dims[-1])`."""
        return self.projection_head(pool_features(self.backbone(pixel_values=images)))
