"""Masked image modelling (He et al., arXiv 2111.06377) by the native ViT-MAE of transformers, on the weights of a ViT.

The names and shapes of the encoder's parameters are those of `ViTModel` without its pooler. Three things differ, and
this module sees to them: the position embeddings are fixed where a ViT trains them (after `from_pretrained` they are
not, since loading makes every parameter trainable), the encoder leaves most patches out in every forward pass, and a
new decoder starts with position embeddings of zero.

The mask is drawn from torch's random state on the device of the images, which a trainer seeds by the key of the step,
or follows from the argument `noise` of `forward`: the patches of smallest noise are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from .backbone import load_backbone

_ENCODER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps", "image_size",
    "patch_size", "num_channels", "qkv_bias",
)  # fmt: skip
_POSITIONS = ("backbone", "sincos")


def mae_from_backbone(
    backbone: str | PreTrainedModel,
    *,
    positions: str = "backbone",
    mask_ratio: float = 0.75,
    norm_pix_loss: bool = True,
    decoder_hidden_size: int = 512,
    decoder_num_hidden_layers: int = 8,
    decoder_num_attention_heads: int = 16,
    decoder_intermediate_size: int = 2048,
) -> ViTMAEForPreTraining:
    """Puts a new decoder on a ViT with its weights, which are copied. Mask and decoder are by default those of the
    paper (sections 3 and 4.1; pixels normalised by patch, which it found better).

    Args:
        backbone (`str` or `PreTrainedModel`): a folder, a Hub id or a model: a ViT or a ViT-MAE (its base model
            counts).
        positions (`str`, *optional*, defaults to `"backbone"`): which position embeddings the encoder keeps: those of
            the backbone, or `"sincos"`, the paper's, for a backbone with random weights: its small random positions
            would stay what they are, and patches could hardly be distinguished.
        mask_ratio (`float`, *optional*, defaults to 0.75): share of the patches to reconstruct.
        norm_pix_loss (`bool`, *optional*, defaults to `True`): whether each patch of the target is normalised.
        decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size: the
            decoder's sizes.

    Raises:
        `ValueError`: for a backbone that is no ViT, unknown `positions`, images or patches that are not square or do
            not fit, and a mask ratio that keeps or masks no patch.
    """
    if positions not in _POSITIONS:
        raise ValueError(f"positions is {positions!r}; it must be one of {', '.join(_POSITIONS)}.")
    source = load_backbone(backbone)
    if not isinstance(source.config, ViTConfig | ViTMAEConfig):
        raise ValueError(
            f"The backbone is a {type(source).__name__}; masked image modelling needs a ViT (model type vit or "
            "vit_mae), whose parameters those of ViTMAEForPreTraining are."
        )
    _check_patches(source.config, mask_ratio)
    config = ViTMAEConfig(
        **{name: getattr(source.config, name) for name in _ENCODER_FIELDS},
        mask_ratio=mask_ratio,
        norm_pix_loss=norm_pix_loss,
        decoder_hidden_size=decoder_hidden_size,
        decoder_num_hidden_layers=decoder_num_hidden_layers,
        decoder_num_attention_heads=decoder_num_attention_heads,
        decoder_intermediate_size=decoder_intermediate_size,
    )
    config._attn_implementation = source.config._attn_implementation
    model = ViTMAEForPreTraining(config)
    # 2026-11: in transformers 5.23 all position embeddings of a new ViT-MAE are zeros, so that no masked patch differs
    # from another: the encoder takes its layers for loaded ones, the decoder's are set to zero after they are made.
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False  # type: ignore[assignment]
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(model.vit.embeddings.patch_embeddings.num_patches)
    model.to(device=source.device, dtype=source.dtype)  # type: ignore[call-arg]
    weights = source.state_dict()
    # A base model may hold more than the encoder uses: the pooler and the mask token of a ViT.
    taken = {name: weights[name] for name in model.vit.state_dict()}
    if positions == "sincos":
        taken["embeddings.position_embeddings"] = model.vit.embeddings.position_embeddings.detach()
    model.vit.load_state_dict(taken)
    return freeze_positions(model)


def _check_patches(config: Any, mask_ratio: float) -> None:
    image, patch = config.image_size, config.patch_size
    if not isinstance(image, int) or not isinstance(patch, int):
        raise ValueError(f"image_size is {image} and patch_size {patch}; ViT-MAE needs squares, one number each.")
    if image % patch:
        raise ValueError(f"image_size is {image}; it must be a multiple of the patch size {patch}.")
    patches = (image // patch) ** 2
    if not 0 < mask_ratio < 1 or not 0 < int(patches * (1 - mask_ratio)) < patches:
        raise ValueError(
            f"mask_ratio is {mask_ratio}; of the {patches} patches of an image at least one must be masked and one "
            "kept: choose a number between 0 and 1."
        )


def freeze_positions(model: ViTMAEForPreTraining) -> ViTMAEForPreTraining:
    """Makes the position embeddings of encoder and decoder constants, as in the paper, and returns the model. Needed
    after `ViTMAEForPreTraining.from_pretrained`: loading makes every parameter trainable (transformers 5.23)."""
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    return model


@contextmanager
def without_masking(model: PreTrainedModel) -> Iterator[None]:
    """Has the encoder of a ViT-MAE see all patches meanwhile, for features; does nothing to any other model.

    Args:
        model (`PreTrainedModel`): its base model counts.
    """
    encoder: Any = model.base_model
    if not isinstance(encoder, ViTMAEModel):
        yield
        return
    config = encoder.embeddings.config
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def masked_error(model: ViTMAEForPreTraining, pixel_values: Tensor, predictions: Tensor, mask: Tensor) -> Tensor:
    """Returns the loss of a ViT-MAE from its predictions, in which it is convex: the mean squared error of masked
    patches (paper, section 3). The model itself computes it within its forward pass only.

    Args:
        model (`ViTMAEForPreTraining`): says how targets are made.
        pixel_values (`torch.Tensor`): shape `(batch, channels, height, width)`.
        predictions (`torch.Tensor`): shape `(batch, patches, patch_size ** 2 * channels)`.
        mask (`torch.Tensor`): 1 for masked patches and 0 for others, shape `(batch, patches)`.
    """
    target = model.patchify(pixel_values)
    if model.config.norm_pix_loss:
        mean, variance = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    errors = (predictions - target).square().mean(dim=-1)  # (batch, patches)
    return (errors * mask).sum() / mask.sum()
