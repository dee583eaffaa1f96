"""Turns released weights of a timm-style ResNet into a checkpoint of this package or of transformers, and back.

    python recipes/convert.py --config recipes/configs/paper_v2/convert.yaml --input pretrained.pth
    python recipes/convert.py --input outputs/pretrained --output pretrained.pth

A `.pth` or `.safetensors` file with a backbone and a projection head becomes a SimCLR checkpoint, which
recipes/bissl.py takes as --lower_model; one with a classifier `fc` an image classifier, any other a backbone. A
checkpoint becomes a file. What was written is read back, and each tensor looked for in it.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .. import SimCLRForPreTraining
from ..cards.card import build_converted_card
from ..cards.facts import ModelFacts, check_license
from ..cards.writing import write_model_card
from ..hub.folder import lay_out, outputs_of_run
from ..hub.process import UploadJob
from ..hub.push_queue import PushQueue
from ..models.saving import save_model
from ..text import format_table
from .arguments import parse_arguments, refusing_bad_input
from .card import CardArguments
from .console import prepare_console
from .conversion import (
    HEAD_PREFIX,
    SAFETENSORS_SUFFIX,
    WEIGHTS_SUFFIXES,
    build_model,
    check_same,
    is_weights_file,
    read_checkpoint,
    read_weights,
    timm_weights_of,
    with_plain_names,
    write_weights,
)
from .outputs import afterwards
from .running import check_one_process


@dataclass
class ConversionArguments:
    """What is converted into what."""

    input: str = field(metadata={"help": "Released weights (.pth, .safetensors) or a checkpoint: folder or Hub id."})
    output: str = field(metadata={"help": "New folder of a checkpoint, or a file to write (.pth, .safetensors)."})
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


@dataclass
class PushArguments:
    """Where the checkpoint goes beside the disk."""

    push_to_hub: bool = field(default=False, metadata={"help": "Push the checkpoint to the Hub."})
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "Its repository; the name of the output folder, in your namespace, if not given."},
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    hub_revision: str | None = field(default=None, metadata={"help": "Its branch, created if need be."})


def check_arguments(options: ConversionArguments, push: PushArguments) -> None:
    source, target = Path(options.input), Path(options.output)
    if is_weights_file(source) == is_weights_file(target):
        raise ValueError(
            f"input is {source} and output is {target}; one must be a file ({', '.join(WEIGHTS_SUFFIXES)}) and the "
            "other a checkpoint."
        )
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"output {target} exists already; choose another.")
    if push.push_to_hub and is_weights_file(target):
        raise ValueError(f"push_to_hub is on and output is the file {target}; only a checkpoint is pushed.")
    check_one_process("The conversion", cpu=True)


def open_queue(target: Path, push: PushArguments) -> PushQueue | None:
    """Checks the token and creates the repository, before anything is converted."""
    if not push.push_to_hub:
        return None
    repository = push.hub_model_id or target.absolute().name
    pushes = PushQueue(target, UploadJob(repository, private=push.hub_private_repo, revision=push.hub_revision))
    pushes.prepare()
    return pushes


def write_checkpoint(options: ConversionArguments, card: CardArguments, repository: str | None) -> PreTrainedModel:
    """Turns a file into a checkpoint with its card."""
    target = Path(options.output)
    weights = read_weights(Path(options.input), options.key)
    model = build_model(weights, head_prefix=options.head_prefix, temperature=options.temperature)
    save_model(model, target)
    try:
        written = timm_weights_of(read_checkpoint("output", options.output))
        check_same(with_plain_names(weights, options.head_prefix), written, target)
    except ValueError:
        shutil.rmtree(target)  # which was not there before
        raise
    facts = ModelFacts(license=card.license)
    with afterwards("The model card"):
        write_model_card(build_converted_card(model, facts, folder=target, repository=repository), target)
    return model


def write_file(options: ConversionArguments) -> PreTrainedModel:
    """Turns a checkpoint into a file."""
    target = Path(options.output)
    model = read_checkpoint("input", options.input)
    prefix = HEAD_PREFIX if options.head_prefix is None else options.head_prefix
    weights = timm_weights_of(model, backbone_prefix=options.backbone_prefix, head_prefix=prefix)
    write_weights(weights, target)
    check_same(weights, read_weights(target, None), target)
    return model


def print_summary(options: ConversionArguments, model: PreTrainedModel) -> None:
    backbone: Any = model.base_model
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (backbone, model)]
    blocks = f"{sum(backbone.config.depths)} {backbone.config.layer_type} blocks"
    kind = f"ResNet with {blocks}, {backbone.config.hidden_sizes[-1]} features"
    rows = [{"part": "backbone", "what it is": kind, "parameters": f"{sizes[0]:,}"}]
    if isinstance(model, SimCLRForPreTraining):
        widths = " x ".join(map(str, model.config.projection_dims))
        rows.append({"part": "projection head", "what it is": widths, "parameters": f"{sizes[1] - sizes[0]:,}"})
    elif sizes[1] > sizes[0]:
        classes = f"{model.config.num_labels} classes"
        rows.append({"part": "classifier", "what it is": classes, "parameters": f"{sizes[1] - sizes[0]:,}"})
    print(f"\n{format_table(rows)}\n")
    output = options.output
    if is_weights_file(Path(output)):
        print(f"{output} holds each tensor of {options.input} under timm's names. To read it:\n")
        safe = Path(output).suffix == SAFETENSORS_SUFFIX
        call = f'safetensors.torch.load_file("{output}")' if safe else f'torch.load("{output}", weights_only=True)'
        print(f"    weights = {call}\n")
        return
    print(f"The {type(model).__name__} in {output} holds each tensor of {options.input}. To go on with it:\n")
    if isinstance(model, SimCLRForPreTraining):
        print(f"    accelerate launch recipes/bissl.py --lower_model {output} ...    aligns it with a downstream task")
    else:
        print(f"    accelerate launch recipes/bissl.py --backbone {output} ...       aligns it with a downstream task")
    print(f"    accelerate launch recipes/finetune.py --model {output} ...       fine-tunes it\n")


def main(arguments: list[str] | None = None) -> None:
    options, push, card = parse_arguments(
        (ConversionArguments, PushArguments, CardArguments), arguments, description=str(__doc__).split("\n\n")[-1]
    )
    prepare_console()
    with refusing_bad_input():
        check_arguments(options, push)
        check_license(card.license)
        pushes = open_queue(Path(options.output), push)
        if is_weights_file(Path(options.output)):
            model = write_file(options)
        else:
            model = write_checkpoint(options, card, pushes.repo_id if pushes else None)
    with afterwards("The summary"):
        print_summary(options, model)
    if pushes is not None:
        with pushes.laying_out() as tree:
            lay_out(outputs_of_run(Path(options.output)), tree)
        pushes.push_and_report("Converted weights")


if __name__ == "__main__":
    main()
