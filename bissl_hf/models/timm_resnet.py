"""Weights of ResNets under timm's names, as the authors of the paper release them, and under those of transformers.

timm's names are those of torchvision too: `conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.bn1`, `layer2.0.downsample.0`,
`fc`. In both libraries the second convolution of a bottleneck has its stride.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor
from transformers import ResNetConfig

from .configuration_simclr import SimCLRConfig

Weights = dict[str, Tensor]
_NORM_FIELDS = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_STEM = {"conv1": "embedder.embedder.convolution", "bn1": "embedder.embedder.normalization"}
_PARTS = {"conv": "convolution", "bn": "normalization"}
# What training scripts put before the names of a model: of DistributedDataParallel, and of an attribute that holds it.
_WRAPPERS = ("module.", "model.", "encoder.", "backbone.")


def to_transformers_name(name: str) -> str | None:
    """Returns the name in a `ResNetModel` of one of timm's below the backbone, or `None` if it is none.

    Example:

    ```python
    >>> from bissl_hf.models.timm_resnet import to_transformers_name
    >>> to_transformers_name("layer2.0.downsample.1.running_var")
    'encoder.stages.1.layers.0.shortcut.normalization.running_var'
    ```
    """
    if match := re.fullmatch(rf"(conv1|bn1)\.{_NORM_FIELDS}", name):
        return f"{_STEM[match[1]]}.{match[2]}"
    if match := re.fullmatch(rf"layer([1-4])\.(\d+)\.(conv|bn)([123])\.{_NORM_FIELDS}", name):
        stage, block, kind, number, field = match.groups()
        return f"{_block(stage, block)}.layer.{int(number) - 1}.{_PARTS[kind]}.{field}"
    if match := re.fullmatch(rf"layer([1-4])\.(\d+)\.downsample\.([01])\.{_NORM_FIELDS}", name):
        stage, block, number, field = match.groups()
        return f"{_block(stage, block)}.shortcut.{('convolution', 'normalization')[int(number)]}.{field}"
    return None


def to_timm_name(name: str) -> str | None:
    """Returns timm's name of one in a `ResNetModel`, or `None` if it has none."""
    for timm, stem in _STEM.items():
        if name.startswith(f"{stem}."):
            return f"{timm}.{name.removeprefix(f'{stem}.')}"
    kinds = {part: kind for kind, part in _PARTS.items()}
    place = r"encoder\.stages\.(\d+)\.layers\.(\d+)"
    if match := re.fullmatch(rf"{place}\.layer\.(\d)\.(convolution|normalization)\.{_NORM_FIELDS}", name):
        stage, block, number, part, field = match.groups()
        return f"layer{int(stage) + 1}.{block}.{kinds[part]}{int(number) + 1}.{field}"
    if match := re.fullmatch(rf"{place}\.shortcut\.(convolution|normalization)\.{_NORM_FIELDS}", name):
        stage, block, part, field = match.groups()
        return f"layer{int(stage) + 1}.{block}.downsample.{0 if part == 'convolution' else 1}.{field}"
    return None


def _block(stage: str, block: str) -> str:
    return f"encoder.stages.{int(stage) - 1}.layers.{block}"


def split_timm_weights(weights: Mapping[str, Tensor], head_prefix: str | None) -> tuple[Weights, Weights, Weights]:
    """Sorts a released state dict.

    Args:
        weights (`Mapping[str, Tensor]`): a backbone under timm's names, maybe behind `module.`, `model.`, `encoder.`
            or `backbone.`, and maybe a projection head and a classifier.
        head_prefix (`str`, *optional*): what stands before the names of the projection head, `projection_head.` for
            instance. Without it the head is the one other group of tensors whose names end in a number and a field,
            as those of an `nn.Sequential`.

    Returns:
        `tuple`: the backbone under the names of `ResNetModel`; the projection head under the names of a sequence,
            empty if there is none; and the classifier `fc`, as `weight` and `bias`, likewise.

    Raises:
        `ValueError`: with the names that are not understood, or if there is no ResNet among them.
    """
    backbone: Weights = {}
    classifier: Weights = {}
    others: Weights = {}
    for name, tensor in weights.items():
        inner = _unwrapped(name)
        translated = to_transformers_name(inner)
        if translated is not None:
            if translated in backbone:
                raise ValueError(f"Two names stand for the backbone's {inner!r}, one of them {name!r}; remove one.")
            backbone[translated] = tensor
        elif inner in ("fc.weight", "fc.bias") and head_prefix is None:
            classifier[inner.removeprefix("fc.")] = tensor
        else:
            others[name] = tensor
    if "embedder.embedder.convolution.weight" not in backbone:
        raise ValueError(
            f"There is no ResNet of timm among the weights, whose names begin with {_abridged(weights)}: it must have "
            "'conv1.weight', behind 'module.', 'model.', 'encoder.' or 'backbone.' at most."
        )
    head, rest = _take_head(others, head_prefix)
    if rest:
        raise ValueError(
            f"{len(rest)} names are not understood: {_abridged(rest)}. Name the projection head with --head_prefix, "
            "or remove what does not belong to the model."
        )
    return backbone, head, classifier


def _unwrapped(name: str) -> str:
    while prefix := next((wrapper for wrapper in _WRAPPERS if name.startswith(wrapper)), ""):
        name = name.removeprefix(prefix)
    return name


def _abridged(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def _take_head(weights: Weights, prefix: str | None) -> tuple[Weights, Weights]:
    """Splits off the projection head, with its layers numbered as in `ProjectionHead`."""
    found = {name: match for name in weights if (match := re.fullmatch(rf"(.*?)(\d+)\.{_NORM_FIELDS}", name))}
    prefixes = sorted({match[1] for match in found.values()})
    if prefix is None:
        if len(prefixes) != 1:
            return {}, weights
        (prefix,) = prefixes
    elif not any(name.startswith(prefix) for name in weights):
        raise ValueError(f"head_prefix is {prefix!r}; no name of the weights begins so. They begin with {prefixes}.")
    mine = {name: match for name, match in found.items() if match[1] == prefix}
    # Whatever stands between the layers with weights (activations, dropout) is counted alike: one ReLU.
    numbers = sorted({int(match[2]) for match in mine.values()})
    places = [3 * (index // 2) + index % 2 for index in range(len(numbers))]
    renumbered = dict(zip(numbers, places, strict=True))
    head = {f"{renumbered[int(match[2])]}.{match[3]}": weights[name] for name, match in mine.items()}
    return head, {name: tensor for name, tensor in weights.items() if name not in mine}


def infer_resnet_config(backbone: Mapping[str, Tensor]) -> ResNetConfig:
    """Returns the configuration of a ResNet from the shapes of its weights under the names of `ResNetModel`."""
    blocks: dict[int, set[int]] = {}
    for name in backbone:
        if match := re.match(r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", name):
            blocks.setdefault(int(match[1]), set()).add(int(match[2]))
    last = 2 if "encoder.stages.0.layers.0.layer.2.convolution.weight" in backbone else 1
    stem = backbone["embedder.embedder.convolution.weight"]
    return ResNetConfig(
        num_channels=stem.shape[1],
        embedding_size=stem.shape[0],
        hidden_sizes=[
            backbone[f"encoder.stages.{stage}.layers.0.layer.{last}.convolution.weight"].shape[0]
            for stage in sorted(blocks)
        ],
        depths=[len(blocks[stage]) for stage in sorted(blocks)],
        layer_type="bottleneck" if last == 2 else "basic",
    )


def projection_dims(head: Mapping[str, Tensor]) -> list[int]:
    """Returns the widths of a projection head of linear layers with batch norm between them, as
    `ProjectionHead` has it: the last linear layer without bias.

    Raises:
        `ValueError`: if the head is built otherwise.
    """
    numbers = sorted({int(name.split(".")[0]) for name in head})
    linear = [number for number in numbers if f"{number}.weight" in head and head[f"{number}.weight"].ndim == 2]
    expected = list(range(0, 3 * len(linear), 3))
    norms = [number for number in numbers if f"{number}.running_mean" in head]
    if not linear or linear != expected or norms != [number + 1 for number in expected[:-1]]:
        raise ValueError(
            "The projection head must be linear layers with batch norm between them; in order its layers have the "
            f"tensors {[sorted(n.split('.', 1)[1] for n in head if int(n.split('.')[0]) == x) for x in numbers]}."
        )
    if f"{linear[-1]}.bias" in head:
        raise ValueError("The last linear layer of the projection head has a bias; that of a SimCLR model has none.")
    return [head[f"{number}.weight"].shape[0] for number in linear]


def simclr_config(backbone: Mapping[str, Tensor], head: Mapping[str, Tensor], temperature: float) -> SimCLRConfig:
    """Returns the configuration of the SimCLR model that these weights belong to."""
    return SimCLRConfig(
        backbone_config=infer_resnet_config(backbone),
        projection_dims=projection_dims(head),
        temperature=temperature,
    )


def to_timm_weights(
    backbone: Mapping[str, Tensor], head: Mapping[str, Tensor], *, backbone_prefix: str, head_prefix: str
) -> Weights:
    """Returns weights under timm's names.

    Args:
        backbone (`Mapping[str, Tensor]`): under the names of `ResNetModel`.
        head (`Mapping[str, Tensor]`): under the names of a sequence.
        backbone_prefix, head_prefix (`str`): put before the names.

    Raises:
        `ValueError`: if a name of the backbone has none in timm.
    """
    names = {name: to_timm_name(name) for name in backbone}
    if unknown := [name for name, timm in names.items() if timm is None]:
        raise ValueError(f"The backbone is no ResNet: timm has no names for {_abridged(unknown)}.")
    weights = {f"{backbone_prefix}{names[name]}": tensor for name, tensor in backbone.items()}
    return weights | {f"{head_prefix}{name}": tensor for name, tensor in head.items()}
