"""Features of a backbone, and their layout in the plane."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import nn

from ..models.backbone import backbone_of, embed_images
from ..models.mae import without_masking


@torch.no_grad()
def extract_features(model: Any, batches: Iterable[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Runs the backbone of a vision model in evaluation mode, that of a ViT-MAE on all patches.

    Args:
        model (`PreTrainedModel`): its backbone is run.
        batches (`Iterable[dict]`): with `pixel_values` and `labels`, on the device of the model.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: features of shape `(rows, width)`, and labels: of shape `(rows,)`, or
            multi-hot of shape `(rows, classes)`.
    """
    backbone: nn.Module = backbone_of(model)
    was_training = backbone.training
    backbone.eval()
    features, labels = [], []
    with without_masking(model):
        for batch in batches:
            features.append(embed_images(model, batch["pixel_values"]).float().cpu().numpy())
            labels.append(batch["labels"].cpu().numpy())
    backbone.train(was_training)
    return np.concatenate(features), np.concatenate(labels)


def with_one_class(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows that have exactly one class and their class numbers, for what compares classes with each other.

    Args:
        features (`np.ndarray`): shape `(rows, ...)`.
        labels (`np.ndarray`): class numbers of shape `(rows,)`, with which all rows are returned; or multi-hot of
            shape `(rows, classes)`.
    """
    if labels.ndim == 1:
        return features, labels
    chosen = labels.sum(axis=1) == 1
    return features[chosen], labels[chosen].argmax(axis=1)


def tsne_layout(features: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Lays features out in the plane by t-SNE (van der Maaten and Hinton, 2008).

    Args:
        features (`np.ndarray`): shape `(rows, width)`, at least 4 rows.
        seed (`int`, *optional*, defaults to 0)

    Returns:
        `np.ndarray`: shape `(rows, 2)`.

    Raises:
        `ValueError`: for fewer than 4 rows.
    """
    if len(features) < 4:
        raise ValueError(f"There are {len(features)} rows; t-SNE needs at least 4.")
    perplexity = min(30.0, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features)
