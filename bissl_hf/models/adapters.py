"""Adapters of `peft` (LoRA) in the models of both levels: found, added, merged, written."""

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME, is_peft_available

from .backbone import backbone_parameters
from .saving import replacing_files

# Names of the projections of queries and values in the attention layers of transformers: BERT, ViT, DINO and Swin in
# their names of before and after transformers 5, then the decoders, GPT-2 with one layer for all three projections.
_USUAL_TARGETS = (("query", "value"), ("q_proj", "v_proj"), ("q_lin", "v_lin"), ("c_attn",))


def require_peft(reason: str) -> None:
    """Refuses to go on without `peft`.

    Raises:
        `RuntimeError`: if it is not installed.
    """
    if not is_peft_available():
        raise RuntimeError(f"{reason} needs peft, which is not installed; install the extra: bissl_hf[peft].")


def unwrap(model: Any) -> Any:
    """Returns the model inside a `peft.PeftModel`, with its adapters; any other model as it is."""
    if is_peft_available():
        from peft import PeftModel

        if isinstance(model, PeftModel):
            return model.get_base_model()
    return model


def adapter_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Returns the adapter in a model, its `name` and the `config` of `peft` as JSON has it, or `None`.

    Raises:
        `ValueError`: if there are several.
    """
    adapters = getattr(model, "peft_config", None)
    if not adapters:
        return None
    if len(adapters) > 1:
        raise ValueError(
            f"{type(model).__name__} has {len(adapters)} adapters ({', '.join(adapters)}); a level takes one: delete "
            "or merge the others first."
        )
    ((name, config),) = adapters.items()
    return {"name": name, "config": json.loads(json.dumps(config.to_dict(), default=_as_json))}


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def add_adapter(model: PreTrainedModel, adapter: dict[str, Any]) -> None:
    """Adds an adapter with empty weights to a model, in place. Every parameter is trainable afterwards.

    Args:
        model (`PreTrainedModel`)
        adapter (`dict`): what `adapter_of` returned.

    Raises:
        `RuntimeError`: if `peft` is not installed.
    """
    require_peft("A model with adapters")
    from peft import inject_adapter_in_model

    config = _peft_config(adapter)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = False  # the weights come from elsewhere; some ways to draw them change the model
    inject_adapter_in_model(config, model, adapter["name"])
    model.requires_grad_(True)


def _peft_config(adapter: dict[str, Any]) -> Any:
    from peft import PeftConfig

    return PeftConfig.from_peft_type(**copy.deepcopy(adapter["config"]))


def frozen_parameters(model: PreTrainedModel) -> list[str]:
    """Returns the names of the parameters that are not trained. `peft` freezes all but the adapters; of a model with
    adapters, those of the heads count as trained that a new model of its class trains."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    if adapter_of(model) is None or model.base_model is model:
        return frozen
    with torch.device("meta"):
        new = type(model)(copy.deepcopy(model.config))
    base = {id(parameter) for parameter in backbone_parameters(new).values()}
    heads = {name for name, p in new.named_parameters() if p.requires_grad and id(p) not in base}
    return [name for name in frozen if name not in heads]


def check_adapters(lower: PreTrainedModel, upper: PreTrainedModel) -> None:
    """Refuses adapters that two levels cannot share.

    Raises:
        `ValueError`: if one level has adapters and the other none, or the lower model has a target of its own.
    """
    found = {"lower": adapter_of(lower), "upper": adapter_of(upper)}
    if found["lower"] is None and found["upper"] is None:
        return
    for level, other in (("lower", "upper"), ("upper", "lower")):
        if found[level] is None:
            raise ValueError(
                f"{other} has adapters and {level} has none; add adapters with the same LoraConfig to both, or merge "
                f"those of {other} first."
            )
    if hasattr(lower, "update_target"):
        raise ValueError(
            f"lower is a {type(lower).__name__}, whose moving target does not follow adapters; use another pretext "
            "task, such as SimCLR, VICReg or ViT-MAE, or train without adapters."
        )


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Merges the adapter of a model into the weights that it adapts, in place, and returns the model: an ordinary
    model of its class. One without adapters is returned as it is."""
    if adapter_of(model) is None:
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
            model.set_submodule(name, kept)
    del model.peft_config
    model._hf_peft_config_loaded = False  # as a model of transformers notes that it has adapters
    return model


def write_adapter(model: PreTrainedModel, directory: str | os.PathLike[str], processing_class: Any = None) -> None:
    """Writes the adapter of a model and its trained heads in the format of `peft`, for
    `peft.PeftModel.from_pretrained`. Files are written aside first.

    Args:
        model (`PreTrainedModel`): its trainable parameters outside of the adapter are written as modules to save.
        directory (`str` or `os.PathLike`): created if need be.
        processing_class (*optional*): image processor or tokenizer.

    Raises:
        `ValueError`: if the model has no adapter.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ValueError(
            f"adapter_only is true, and {type(model).__name__} has no adapters; leave it out, or join models with "
            "adapters (see BiSSLModel.from_models)."
        )
    from peft import get_peft_model_state_dict

    config = _peft_config(adapter)
    tensors = dict(get_peft_model_state_dict(model, adapter_name=adapter["name"]))
    heads = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and f".{adapter['name']}." not in name
    }
    modules = sorted({name.rpartition(".")[0] for name in heads})
    config.modules_to_save = [*(config.modules_to_save or []), *modules] or None
    config.inference_mode = True
    with replacing_files(directory) as folder:
        config.save_pretrained(str(folder))
        save_file(_prefixed({**tensors, **heads}), Path(folder) / "adapter_model.safetensors", {"format": "pt"})
        if processing_class is not None:
            processing_class.save_pretrained(folder)


def write_state(model: PreTrainedModel, directory: Path) -> None:
    """Writes all weights of a model with adapters under their names in it, for `read_state`."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(tensors, directory / SAFE_WEIGHTS_NAME, {"format": "pt"})
    model.config.save_pretrained(directory)


def read_state(model: PreTrainedModel, directory: Path) -> None:
    """Reads what `write_state` has written into a model with the same adapters."""
    model.load_state_dict(load_file(directory / SAFE_WEIGHTS_NAME))


def _prefixed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of tensors as `peft` has them on disk: those of a model inside a tuner inside a `PeftModel`."""
    return {f"base_model.model.{name}": tensor.contiguous().clone() for name, tensor in tensors.items()}


def train_heads(model: PreTrainedModel) -> None:
    """Has the heads of a model be trained, in place; `peft` freezes all but the adapters."""
    below = {id(parameter) for parameter in backbone_parameters(model).values()}
    for parameter in model.parameters():
        if id(parameter) not in below:
            parameter.requires_grad_(True)


def usual_targets(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the layers that LoRA usually adapts in this kind of model: the projections of queries and
    values (Hu et al., arXiv 2106.09685, section 7.1).

    Raises:
        `ValueError`: if the model has none of the known names.
    """
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for targets in _USUAL_TARGETS:
        if names.issuperset(targets):
            return targets
    raise ValueError(
        f"{type(model).__name__} has no layers of a name that LoRA usually adapts "
        f"({'; '.join(', '.join(targets) for targets in _USUAL_TARGETS)}); name its own layers in lora_target."
    )


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int | None = None,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
) -> PreTrainedModel:
    """Adds LoRA adapters to layers of the base model, in place, and returns the model.

    Args:
        model (`PreTrainedModel`)
        rank (`int`): of the products B A that are added to the weights.
        alpha (`int`, *optional*): the products are scaled by `alpha / rank`; `rank` if not given.
        targets (`Sequence[str]`, *optional*): last parts of the names of the layers to adapt; by default the
            projections of queries and values.
        dropout (`float`, *optional*, defaults to 0): in front of the adapters.

    Raises:
        `ValueError`: if a layer does not exist, or a number is not allowed.
        `RuntimeError`: if `peft` is not installed.

    Example:

    ```python
    >>> from transformers import ViTConfig, ViTForImageClassification
    >>> from bissl_hf.models.adapters import add_lora
    >>> model = ViTForImageClassification(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> model = add_lora(model, rank=2)  # doctest: +SKIP
    ```
    """
    require_peft("LoRA")
    if rank < 1:
        raise ValueError(f"lora_rank is {rank}; it must be at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout}; it must be at least 0 and below 1.")
    from peft import LoraConfig

    wanted = tuple(targets) if targets else usual_targets(model.base_model)
    layers = _adapted_layers(model, wanted)
    base: Any = model.base_model
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=layers,
        base_model_name_or_path=_name(model.config) or _name(base.config),
    )
    model.add_adapter(config)
    return model


def _name(config: PretrainedConfig) -> str | None:
    return getattr(config, "_name_or_path", None) or None


def _adapted_layers(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Returns the full names of the layers of the base model whose names end in one of the targets."""
    base = {id(module) for module in model.base_model.modules()}
    # Layers with weights of two dimensions and without parts: linear ones, embeddings, those of GPT-2.
    layers = [
        name
        for name, module in model.named_modules()
        if id(module) in base and isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim > 1
    ]
    found = []
    for target in targets:
        ends = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not ends:
            known = sorted({name.rpartition(".")[2] for name in layers})
            raise ValueError(
                f"lora_target is {target!r}, which is no layer with weights of {type(model.base_model).__name__}; its "
                f"layers are called {', '.join(known)}."
            )
        found += ends
    return sorted(set(found))
