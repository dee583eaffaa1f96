"""Turns released weights of a timm-style ResNet into a checkpoint of this package or of transformers, and back.

    python recipes/convert.py --input pretrained.pth --output outputs/pretrained
    python recipes/convert.py --input outputs/pretrained --output pretrained.pth

A `.pth` file with a backbone and a projection head becomes a SimCLR checkpoint, which recipes/bissl.py takes as
--lower_model; one with a classifier `fc` an image classifier, any other a backbone. A checkpoint becomes a `.pth`.
"""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetForImageClassification,
    ResNetModel,
)
from transformers.utils.logging import disable_progress_bar

from bissl_hf import SimCLRConfig, SimCLRForPreTraining
from bissl_hf.cli.arguments import parse_arguments, refusing_bad_input
from bissl_hf.models.timm_resnet import infer_resnet_config, simclr_config, split_timm_weights, to_timm_weights

TORCH_SUFFIXES = (".pth", ".pt", ".bin")


@dataclass
class ConversionArguments:
    """What is converted into what."""

    input: str = field(metadata={"help": "Released weights (.pth, .pt, .bin), or a checkpoint: a folder or Hub id."})
    output: str = field(metadata={"help": "New folder of a checkpoint, or the file to write (.pth, .pt, .bin)."})
    key: str | None = field(
        default=None, metadata={"help": "Entry of the file that holds the weights, if it holds more: state_dict, say."}
    )
    head_prefix: str | None = field(
        default=None,
        metadata={
            "help": "What stands before the names of the projection head; found by itself, or projection_head. when "
            "writing."
        },
    )
    backbone_prefix: str = field(default="", metadata={"help": "What to put before the backbone's names in writing."})
    temperature: float = field(default=0.5, metadata={"help": "Temperature of the SimCLR model's loss."})


def read_weights(path: Path, key: str | None) -> dict[str, Tensor]:
    """Reads a state dict; nothing in the file is run."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} holds no plain weights that can be loaded safely: {reason}") from error
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


def build_model(weights: dict[str, Tensor], arguments: ConversionArguments) -> PreTrainedModel:
    """The model that released weights belong to, with all of them."""
    backbone, head, classifier = split_timm_weights(weights, arguments.head_prefix)
    if head and classifier:
        raise ValueError("The weights have both a projection head and a classifier fc; remove one of them.")
    if head:
        simclr = SimCLRForPreTraining(simclr_config(backbone, head, arguments.temperature))
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


def read_checkpoint(source: str, arguments: ConversionArguments) -> dict[str, Tensor]:
    """The weights of a checkpoint under timm's names."""
    prefix = "projection_head." if arguments.head_prefix is None else arguments.head_prefix
    config = AutoConfig.from_pretrained(source)
    head: dict[str, Tensor] = {}
    if isinstance(config, SimCLRConfig):
        simclr = SimCLRForPreTraining.from_pretrained(source)
        backbone, head = simclr.backbone.state_dict(), simclr.projection_head.state_dict()
    elif "ResNetModel" in (config.architectures or []):
        backbone = ResNetModel.from_pretrained(source).state_dict()
    else:
        model = AutoModelForImageClassification.from_pretrained(source)
        backbone, prefix = model.base_model.state_dict(), "fc."
        if isinstance(model, ResNetForImageClassification):
            head = model.classifier[1].state_dict()
    return to_timm_weights(backbone, head, backbone_prefix=arguments.backbone_prefix, head_prefix=prefix)


def main(arguments: list[str] | None = None) -> None:
    (options,) = parse_arguments((ConversionArguments,), arguments, description=str(__doc__).split("\n\n")[-1])
    disable_progress_bar()  # of reading and writing weights, which takes a moment
    source, target = Path(options.input), Path(options.output)
    with refusing_bad_input():
        if (source.suffix in TORCH_SUFFIXES) == (target.suffix in TORCH_SUFFIXES):
            raise ValueError(
                f"input is {source} and output is {target}; one must be a file ({', '.join(TORCH_SUFFIXES)}) and the "
                "other a checkpoint."
            )
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise ValueError(f"output {target} exists already; choose another.")
        if source.suffix in TORCH_SUFFIXES:
            model = build_model(read_weights(source, options.key), options)
            model.save_pretrained(target)
            size, kind = sum(p.numel() for p in model.parameters()), type(model).__name__
        else:
            weights = read_checkpoint(options.input, options)
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(weights, target)
            size, kind = sum(tensor.numel() for tensor in weights.values()), "state dict under timm's names"
    print(f"{source} was converted into {target}: {kind}, {size:,} numbers.")


if __name__ == "__main__":
    main()
