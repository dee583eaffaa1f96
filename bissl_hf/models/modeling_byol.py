"""BYOL (Grill et al., arXiv 2006.07733) on any vision backbone of transformers."""

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..losses import byol_loss, byol_loss_of_unit_vectors, unit_vectors
from ..tensors import at_least_float32
from .backbone import embed_images
from .configuration_byol import BYOLConfig
from .modeling_pretext import PretextModel, ProjectionHead, split_views


class BYOLForPreTraining(PretextModel):
    """A backbone with a projector and a predictor, which predicts the projections that a slowly moving copy of
    backbone and projector, the target, makes of the other view.

    The target is part of the model and of its checkpoints, but not of its base model: its parameters are frozen and
    get no gradient. The loss does not move them; a trainer calls `update_target` after each step of the optimizer.

    The target's batch norm normalises by the statistics of its own batch in train mode, as in the paper. Its running
    statistics therefore play no part in training. They follow the target's own passes, as those of any layer do: the
    averages of the online network's would belong to other weights. `restart_target` copies them with the weights.

    Args:
        config ([`BYOLConfig`])

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf import BYOLConfig, BYOLForPreTraining
    >>> model = BYOLForPreTraining(BYOLConfig())
    >>> model(pixel_values=torch.rand(4, 2, 3, 32, 32)).embeddings.shape
    torch.Size([4, 4, 256])
    ```
    """

    config_class = BYOLConfig

    def __init__(self, config: BYOLConfig) -> None:
        super().__init__(config)
        self.predictor = ProjectionHead(config.projection_dims[-1], config.predictor_dims)
        self.target = nn.ModuleDict(
            {"backbone": copy.deepcopy(self.backbone), "projection_head": copy.deepcopy(self.projection_head)}
        )
        self.post_init()
        self.target.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a model, see [`~transformers.PreTrainedModel.from_pretrained`], and freezes the target again: loading
        replaces each parameter by one that requires gradients."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).target.requires_grad_(False)
        return loaded

    @classmethod
    def from_backbone(cls, backbone: str | PreTrainedModel, **settings: Any) -> Self:
        """Puts new heads on a backbone with its weights; the target starts as its copy. See
        [`PretextModel.from_backbone`]."""
        model = super().from_backbone(backbone, **settings)
        model.restart_target()
        return model

    def embed_inputs(self, pixel_values: Tensor) -> Tensor:
        """Returns predictions and targets of both views, shape `(batch, 4, dim)`: the predictions of the first and of
        the second view, then their targets, which carry no gradient. All pass view by view.

        Raises:
            `ValueError`: for another shape than `(batch, 2, channels, height, width)`.
        """
        views = split_views(pixel_values)
        predictions = [self.predictor(self.embed(view)) for view in views]
        with torch.no_grad():
            targets = [self._embed_by_target(view) for view in views]
        return torch.stack([*predictions, *targets], dim=1)

    def _embed_by_target(self, images: Tensor) -> Tensor:
        return self.target["projection_head"](embed_images(self.target["backbone"], images))

    def loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the mean of 2 - 2 cos over both ways, of what `embed_inputs` returns, shape `()`."""
        return byol_loss(embeddings[:, :2], embeddings[:, 2:])

    def outputs_for_loss(self, **inputs: Any) -> Tensor:
        """Returns the outputs in which the loss is convex, see `outputs_from_embeddings`."""
        return self.outputs_from_embeddings(self(**inputs, return_loss=False).embeddings)

    def outputs_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns what `embed_inputs` returns with each prediction and target divided by its length, shape
        `(batch, 4, dim)`. 2 - 2 cos is not convex in a prediction of any length, but the squared distance of two unit
        vectors, which has the same value, is convex in them."""
        return unit_vectors(at_least_float32(embeddings))

    def loss_from_outputs(self, outputs: Tensor) -> Tensor:
        """Returns the loss of what `outputs_for_loss` returns: the mean squared distance of predictions and targets,
        shape `()`. Its second derivative in the predictions is constant."""
        return byol_loss_of_unit_vectors(outputs[:, :2], outputs[:, 2:])

    # The target

    def ema_decay(self, step: int, total_steps: int) -> float:
        """Returns the share of itself that the target keeps in a step: `ema_decay` of the configuration, tau_base, or
        with the schedule `cosine`  1 - (1 - tau_base) (cos(pi step / total_steps) + 1) / 2  (paper, section 3.3).

        Args:
            step (`int`): number of steps before this one.
            total_steps (`int`): of the whole training.

        Raises:
            `ValueError`: if `step` is not between 0 and `total_steps`, or there are none.
        """
        if not 0 <= step <= total_steps or total_steps < 1:
            raise ValueError(f"step is {step} of {total_steps}; it must be between 0 and total_steps, at least 1.")
        decay = self.config.ema_decay
        if self.config.ema_schedule == "cosine":
            return 1 - (1 - decay) * (math.cos(math.pi * step / total_steps) + 1) / 2
        return decay

    @torch.no_grad()
    def update_target(self, step: int, total_steps: int) -> None:
        """Moves the target towards the online network; for a trainer to call once after each step of the optimizer
        that moves this model.

        Args:
            step (`int`), total_steps (`int`): see `ema_decay`.
        """
        targets, online = self._target_pairs("parameters")
        torch._foreach_lerp_(targets, online, 1 - self.ema_decay(step, total_steps))

    @torch.no_grad()
    def restart_target(self) -> None:
        """Makes the target a copy of the online network, running statistics included."""
        for kind in ("parameters", "buffers"):
            for target, online in zip(*self._target_pairs(kind), strict=True):
                target.copy_(online)

    def _target_pairs(self, kind: str) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the `parameters` or `buffers` of the target, and those of the online network in the same order."""
        names = ("backbone", "projection_head")
        targets = [tensor for name in names for tensor in getattr(self.target[name], kind)()]
        online = [tensor for name in names for tensor in getattr(getattr(self, name), kind)()]
        return targets, online
