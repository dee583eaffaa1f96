"""SimCLR (Chen et al., arXiv 2002.05709) on any vision backbone of transformers."""

from typing import Any

from torch import Tensor

from ..losses import nt_xent_from_similarities, nt_xent_loss, pair_similarities
from .configuration_simclr import SimCLRConfig
from .modeling_pretext import PretextModel


class SimCLRForPreTraining(PretextModel):
    """A backbone with a projection head and the NT-Xent loss. The views pass separately, and the head has batch norm
    between its linear layers, as in the BiSSL paper (arXiv 2410.02387, section 4).

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

    def __init__(self, config: SimCLRConfig) -> None:
        super().__init__(config)
        self.post_init()

    def loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the NT-Xent loss of embeddings `(batch, 2, projection_dims[-1])`, shape `()`."""
        return nt_xent_loss(*embeddings.unbind(1), temperature=self.config.temperature)

    def outputs_for_loss(self, **inputs: Any) -> Tensor:
        """Returns the outputs in which the loss is convex, the similarities of all pairs of embeddings. A model with
        this method and `loss_from_outputs` has a Gauss-Newton matrix ([`bissl_hf.bilevel.gauss_newton`])."""
        return self.outputs_from_embeddings(self(**inputs, return_loss=False).embeddings)

    def outputs_from_embeddings(self, embeddings: Tensor) -> Tensor:
        """Returns the same from embeddings `(batch, 2, projection_dims[-1])`, which may be made in parts."""
        return pair_similarities(*embeddings.unbind(1), temperature=self.config.temperature)

    def loss_from_outputs(self, outputs: Tensor) -> Tensor:
        """Returns the loss of `outputs_for_loss`, shape `()`."""
        return nt_xent_from_similarities(outputs)
