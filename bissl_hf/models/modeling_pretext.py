"""What the pretext models have in common: a backbone, a projection head, and a loss of embeddings."""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .backbone import build_backbone, load_backbone, pool_features
from .configuration_pretext import PretextConfig


@dataclass
class PretextOutput(ModelOutput):
    """What a pretext model returns.

    Args:
        loss (`torch.Tensor`): pretext loss, shape `()`.
        embeddings (`torch.Tensor`): shape `(batch, views, dim)`.
    """

    loss: Tensor | None = None
    embeddings: Tensor | None = None


class ProjectionHead(nn.Sequential):
    """Linear, batch norm, ReLU, ..., and a last linear layer without bias.

    Args:
        feature_size (`int`): width of the inputs.
        dims (`Sequence[int]`): widths of the linear layers.
    """

    def __init__(self, feature_size: int, dims: Sequence[int]) -> None:
        layers: list[Any] = []
        width = feature_size
        for dim in dims[:-1]:
            layers += [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU()]
            width = dim
        super().__init__(*layers, nn.Linear(width, dims[-1], bias=False))
        for layer in [*layers, self[-1]]:
            # They have drawn their weights by now, except on the meta device, where `from_pretrained` builds.
            layer._is_hf_initialized = all(not parameter.is_meta for parameter in layer.parameters())


class PretextModel(PreTrainedModel):
    """A backbone with a projection head and a loss of embeddings.

    A subclass names its `config_class`, calls `post_init` at the end of its constructor and defines
    `loss_from_embeddings`. Two views of each image are embedded by the backbone and the head, one after the other;
    another layout of inputs overrides `embed_inputs`.

    A model with `loss_from_embeddings` and `return_loss` can be trained in parts with the loss of the whole batch
    (`lower_gradient_cache`). One whose loss is a convex function of some outputs offers `outputs_from_embeddings` and
    `loss_from_outputs` beside it, for the Gauss-Newton curvature.

    Args:
        config ([`PretextConfig`])
    """

    config_class: type[PretextConfig] = PretextConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PretextConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.projection_head = ProjectionHead(config.feature_size, config.projection_dims)

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]
        """Whether the backbone does."""
        return bool(self.backbone.supports_gradient_checkpointing)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only heads are initialised here; the layers of the backbone by the backbone itself. Both are torch's
        # defaults (He for linear layers with the gain of their reset), as in the authors' SimCLR.
        if isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_backbone(cls, backbone: str | PreTrainedModel, **settings: Any) -> Self:
        """Puts new heads on a backbone with its weights, which are copied.

        Args:
            backbone (`str` or `PreTrainedModel`): a folder, a Hub id, or a model (its base model counts).
            **settings: arguments of the model's configuration class other than `backbone_config`.

        Raises:
            `TypeError`: for a setting that the configuration does not have.
            `ValueError`: if the backbone takes no images, or its weights are not all there.
        """
        known = set(inspect.signature(cls.config_class.__init__).parameters) - {"self", "kwargs", "backbone_config"}
        if unknown := sorted(set(settings) - known):
            raise TypeError(
                f"{cls.config_class.__name__} does not take {', '.join(unknown)}; it takes {', '.join(sorted(known))}."
            )
        source = load_backbone(backbone)
        if source.main_input_name != "pixel_values":
            raise ValueError(
                f"The backbone is a {type(source).__name__}, which takes {source.main_input_name}; {cls.__name__} "
                "needs a vision model."
            )
        model: Any = cls(cls.config_class(backbone_config=copy.deepcopy(source.config), **settings))
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

    def forward(self, pixel_values: Tensor, return_loss: bool = True, **kwargs: Any) -> PretextOutput:
        """Embeds the images and compares the embeddings.

        Args:
            pixel_values (`torch.Tensor`): as `embed_inputs` takes them, shape `(batch, 2, channels, height, width)`.
            return_loss (`bool`, *optional*, defaults to `True`): whether to compare the embeddings.

        Raises:
            `ValueError`: for another shape.
        """
        embeddings = self.embed_inputs(pixel_values)
        return PretextOutput(
            loss=self.loss_from_embeddings(embeddings) if return_loss else None, embeddings=embeddings
        )

    def loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the pretext loss of what `embed_inputs` returns, shape `()`: the mean over this process's rows,
        without side effects."""
        raise NotImplementedError(f"{type(self).__name__} must define loss_from_embeddings.")

    def embed_inputs(self, pixel_values: Tensor) -> Tensor:
        """Returns the embeddings of both views `(batch, 2, channels, height, width)`, shape `(batch, 2, dim)`. The
        views pass one after the other, so that batch-norm statistics are taken per view.

        Raises:
            `ValueError`: for another shape.
        """
        return torch.stack([self.embed(view) for view in split_views(pixel_values)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Returns the embeddings of images `(batch, channels, height, width)`, shape `(batch,
        projection_dims[-1])`."""
        return self.projection_head(pool_features(self.backbone(pixel_values=images)))


def split_views(pixel_values: Tensor) -> tuple[Tensor, ...]:
    """Returns both views of a batch `(batch, 2, channels, height, width)`.

    Raises:
        `ValueError`: for another shape.
    """
    if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)}; it must be (batch, 2, channels, height, width): two "
            "views."
        )
    return pixel_values.unbind(1)
