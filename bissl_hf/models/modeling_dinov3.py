"""Image classifiers on DINOv3 (arXiv 2508.10104), of which transformers 5.23 has the backbones only.

They are written as the native classifiers of other backbones are, and known to `AutoModelForImageClassification` once
this package is imported. Without it `AutoModel` opens the backbone of their checkpoints.

2026-11: to be deleted when transformers has classes of these names.
"""

from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    DINOv3ConvNextPreTrainedModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    DINOv3ViTPreTrainedModel,
    PreTrainedModel,
)
from transformers.modeling_outputs import ImageClassifierOutput


class DINOv3ViTForImageClassification(DINOv3ViTPreTrainedModel):
    """A linear layer on the class token of a DINOv3 ViT.

    Args:
        config (`DINOv3ViTConfig`)
    """

    config_class = DINOv3ViTConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DINOv3ViTModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Returns logits `(batch, num_labels)` for images `(batch, channels, height, width)`, and with labels the
        loss."""
        return _classify(self, self.classifier, pixel_values, labels, kwargs)


class DINOv3ConvNextForImageClassification(DINOv3ConvNextPreTrainedModel):
    """A linear layer on the pooled features of a DINOv3 ConvNeXt.

    Args:
        config (`DINOv3ConvNextConfig`)
    """

    config_class = DINOv3ConvNextConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DINOv3ConvNextModel(config)
        self.classifier = nn.Linear(config.hidden_sizes[-1], config.num_labels)
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> ImageClassifierOutput:
        """Returns logits `(batch, num_labels)` for images `(batch, channels, height, width)`, and with labels the
        loss."""
        return _classify(self, self.classifier, pixel_values, labels, kwargs)


def _classify(
    model: PreTrainedModel, classifier: nn.Module, pixel_values: Tensor, labels: Tensor | None, kwargs: dict[str, Any]
) -> ImageClassifierOutput:
    outputs = model.base_model(pixel_values, **kwargs)
    logits = classifier(outputs.pooler_output)
    loss = None if labels is None else model.loss_function(labels, logits, model.config)
    return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)


for _config, _model in (
    (DINOv3ViTConfig, DINOv3ViTForImageClassification),
    (DINOv3ConvNextConfig, DINOv3ConvNextForImageClassification),
):
    if _config not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        # `exist_ok`, since transformers otherwise registers nothing for its own configurations.
        AutoModelForImageClassification.register(_config, _model, exist_ok=True)
