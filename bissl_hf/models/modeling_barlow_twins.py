"""Barlow Twins (Zbontar et al., arXiv 2103.03230) on any vision backbone of transformers."""

from torch import Tensor

from ..losses import barlow_twins_loss
from .configuration_barlow_twins import BarlowTwinsConfig
from .modeling_pretext import PretextModel


class BarlowTwinsForPreTraining(PretextModel):
    """A backbone with a projector and the loss of redundancy reduction.

    The loss is not convex in the embeddings (they are normalised, and their correlations squared), so there is no
    `outputs_from_embeddings`: the Gauss-Newton curvature does not apply.

    Args:
        config ([`BarlowTwinsConfig`])

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf import BarlowTwinsConfig, BarlowTwinsForPreTraining
    >>> model = BarlowTwinsForPreTraining(BarlowTwinsConfig(projection_dims=(256, 256, 256)))
    >>> model(pixel_values=torch.rand(4, 2, 3, 32, 32)).embeddings.shape
    torch.Size([4, 2, 256])
    ```
    """

    config_class = BarlowTwinsConfig

    def __init__(self, config: BarlowTwinsConfig) -> None:
        super().__init__(config)
        self.post_init()

    def loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the loss of embeddings `(batch, 2, projection_dims[-1])`, shape `()`."""
        return barlow_twins_loss(*embeddings.unbind(1), redundancy_weight=self.config.redundancy_weight)
