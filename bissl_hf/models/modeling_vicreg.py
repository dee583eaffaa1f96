"""VICReg (Bardes et al., arXiv 2105.04906) on any vision backbone of transformers."""

from torch import Tensor

from ..losses import vicreg_loss
from .configuration_vicreg import VICRegConfig
from .modeling_pretext import PretextModel


class VICRegForPreTraining(PretextModel):
    """A backbone with an expander and the loss of variance, invariance and covariance.

    The loss is not convex in the embeddings (the covariance term is of fourth order in them), so there is no
    `outputs_from_embeddings`: the Gauss-Newton curvature does not apply.

    Args:
        config ([`VICRegConfig`])

    Example:

    ```python
    >>> import torch
    >>> from bissl_hf import VICRegConfig, VICRegForPreTraining
    >>> model = VICRegForPreTraining(VICRegConfig(projection_dims=(256, 256, 256)))
    >>> model(pixel_values=torch.rand(4, 2, 3, 32, 32)).embeddings.shape
    torch.Size([4, 2, 256])
    ```
    """

    config_class = VICRegConfig

    def __init__(self, config: VICRegConfig) -> None:
        super().__init__(config)
        self.post_init()

    def loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the loss of embeddings `(batch, 2, projection_dims[-1])`, shape `()`."""
        return vicreg_loss(
            *embeddings.unbind(1),
            invariance_weight=self.config.invariance_weight,
            variance_weight=self.config.variance_weight,
            covariance_weight=self.config.covariance_weight,
        )
