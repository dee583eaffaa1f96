"""Released weights under timm's names and checkpoints: reading and building both, and finding each tensor again."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, PreTrainedModel, ResNetForImageClassification, ResNetModel

from ..models.configuration_simclr import SimCLRConfig
from ..models.loading import load_pretrained
from ..models.modeling_simclr import SimCLRForPreTraining
from ..models.timm_resnet import Weights, infer_resnet_config, simclr_config, split_timm_weights, to_timm_weights
from .loading import load_config, loading

HEAD_PREFIX = "projection_head."
SAFETENSORS_SUFFIX = ".safetensors"
WEIGHTS_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", SAFETENSORS_SUFFIX)


def read_weights(path: Path, key: str | None) -> Weights:
    """Reads a state dict; nothing in the file is run.

    Args:
        path (`Path`): of safetensors, or a file of torch.
        key (`str`, *optional*): entry of the file that holds the weights, if it holds more.

    Raises:
        `ValueError`: if there is no such file or entry, or it holds something else.
    """
    content = _read(path)
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            found = sorted(content)[:8] if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"key is {key!r}; {path} holds {found}.")
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        inner = (
            [name for name, value in content.items() if isinstance(value, dict)] if isinstance(content, dict) else []
        )
        raise ValueError(f"{path} is no state dict of tensors; choose one of its entries {inner} with --key.")
    return content


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no file {path}.")
    try:
        if path.suffix == SAFETENSORS_SUFFIX:
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle with more in it than plain weights, and is not run; write its state dict alone with "
            "torch.save, or give a .safetensors file."
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} holds no weights that can be read: {reason}") from error


def write_weights(weights: Weights, path: Path) -> None:
    """Writes a state dict: as safetensors where the name says so, else as a file of torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == SAFETENSORS_SUFFIX:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path, {"format": "pt"})
    else:
        torch.save(weights, path)


def is_weights_file(path: Path) -> bool:
    """Whether a path is that of a file of weights, by its ending; else it is that of a checkpoint."""
    return path.name.endswith(WEIGHTS_SUFFIXES)


def build_model(weights: Weights, *, head_prefix: str | None = None, temperature: float = 0.5) -> PreTrainedModel:
    """Returns the model that released weights belong to, with all of them.

    Args:
        weights (`dict[str, Tensor]`), head_prefix (`str`, *optional*): see [`split_timm_weights`].
        temperature (`float`, *optional*, defaults to 0.5): of the loss, if it is a SimCLR model.

    Raises:
        `ValueError`: if they are no ResNet of timm's, or have two heads.
    """
    backbone, head, classifier = split_timm_weights(weights, head_prefix)
    if head and classifier:
        raise ValueError("The weights have both a projection head and a classifier fc; remove one of them.")
    if head:
        simclr = SimCLRForPreTraining(simclr_config(backbone, head, temperature))
        simclr.projection_head.load_state_dict(head)
        simclr.backbone.load_state_dict(backbone)
        return simclr
    config = infer_resnet_config(backbone)
    if not classifier:
        model = ResNetModel(config)
        model.load_state_dict(backbone)
        return model
    config.num_labels = len(classifier["weight"])
    with_head = ResNetForImageClassification(config)
    with_head.resnet.load_state_dict(backbone)
    with_head.classifier[1].load_state_dict(classifier)
    return with_head


def read_checkpoint(field: str, source: str) -> PreTrainedModel:
    """Loads a checkpoint whose weights timm may have names for: a SimCLR model, a backbone or an image classifier.

    Args:
        field (`str`): the argument that names it, for messages.
        source (`str`): a folder or Hub id.

    Raises:
        `ValueError`: if it cannot be loaded.
    """
    config = load_config(field, source)
    kind: Any = AutoModelForImageClassification
    if isinstance(config, SimCLRConfig):
        kind = SimCLRForPreTraining
    elif "ResNetModel" in (config.architectures or []):
        kind = ResNetModel
    with loading(field, source):
        return load_pretrained(kind, source)


def timm_weights_of(model: PreTrainedModel, *, backbone_prefix: str = "", head_prefix: str = HEAD_PREFIX) -> Weights:
    """Returns the weights of a model under timm's names.

    Args:
        model (`PreTrainedModel`)
        backbone_prefix, head_prefix (`str`, *optional*): put before the names of backbone and projection head.

    Raises:
        `ValueError`: if timm has no name for one of them.
    """
    head: Weights = {}
    if isinstance(model, SimCLRForPreTraining):
        head = model.projection_head.state_dict()
    elif isinstance(model, ResNetForImageClassification):
        head, head_prefix = model.classifier[1].state_dict(), "fc."
    return to_timm_weights(
        model.base_model.state_dict(), head, backbone_prefix=backbone_prefix, head_prefix=head_prefix
    )


def with_plain_names(weights: Weights, head_prefix: str | None = None) -> Weights:
    """Returns released weights under the names that [`timm_weights_of`] gives those of their model."""
    backbone, head, classifier = split_timm_weights(weights, head_prefix)
    prefix = HEAD_PREFIX if head else "fc."
    return to_timm_weights(backbone, head or classifier, backbone_prefix="", head_prefix=prefix)


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], target: Path) -> None:
    """Looks for each tensor in what was read back, number for number.

    Args:
        expected (`Mapping[str, Tensor]`): what was to be written.
        found (`Mapping[str, Tensor]`): what was read back from `target`, under the same names.
        target (`Path`)

    Raises:
        `ValueError`: with the first tensor that is another one: a float64, say, that float32 does not hold.
    """
    for name, given in tqdm(expected.items(), desc=f"Checking {target.name}", unit=" tensors"):
        kept = found.get(name)
        if kept is None or not torch.equal(given, kept.to(given.dtype)):
            raise ValueError(
                f"{name}, given as {given.dtype}, is not the same in {target}. Checkpoints hold float32: give weights "
                "that are no wider."
            )
