"""Backbones: the base models of image classifiers, built, loaded and pooled."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .auto import PRETEXT_MODELS, pretext_class
from .finite import with_finite_weights


def _classifies_images(config: PretrainedConfig) -> bool:
    return type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING


def build_backbone(config: PretrainedConfig) -> PreTrainedModel:
    """Builds the base model of the image classifier of this configuration, so that both hold the same parameters: a
    ViT classifier, say, has no pooler while a plain `ViTModel` has one. Its dtype is torch's default, as the head's
    is, whatever the configuration of a checkpoint in half precision says."""
    if _classifies_images(config):
        return AutoModelForImageClassification.from_config(config, dtype=torch.get_default_dtype()).base_model
    return AutoModel.from_config(config, dtype=torch.get_default_dtype())


def load_backbone(source: str | PreTrainedModel) -> Any:
    """Returns the base model behind a folder, a Hub id or a model."""
    if isinstance(source, PreTrainedModel):
        return with_finite_weights(source.base_model, f"the {type(source).__name__}")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type in PRETEXT_MODELS:
        pretrained: Any = pretext_class(config.model_type).from_pretrained(source)
        return with_finite_weights(pretrained.backbone, source)
    auto_class = AutoModelForImageClassification if _classifies_images(config) else AutoModel
    # A head that is missing is expected here and would be reported at length; a backbone that is not whole is an
    # error.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = auto_class.from_pretrained(source, output_loading_info=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)
    backbone_keys = set(model.base_model.state_dict())
    missing = sorted(name for key in report["missing_keys"] if (name := _below_base(model, key)) in backbone_keys)
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of the backbone's parameters: {', '.join(missing[:5])}.")
    return with_finite_weights(model.base_model, source)


def _below_base(model: PreTrainedModel, key: str) -> str:
    return key.removeprefix(f"{model.base_model_prefix}.")


def pool_features(outputs: Any) -> Tensor:
    """Returns one feature vector per image, shape `(batch, width)`, from the outputs of a backbone: those that it
    pooled itself, else the class token of a sequence, else the mean over a map."""
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is not None:
        return pooled.flatten(1)
    hidden = outputs.last_hidden_state
    return hidden[:, 0] if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
