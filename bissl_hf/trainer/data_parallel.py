"""What the trainers ask of a start on several processes: whole models in each of them (DDP), and nothing else yet."""

import os
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from ..data.shared_memory import processes_here
from ..text import for_terminal
from .fields import SECOND_ORDER

_WHOLE_MODELS = (
    "The hypergradient needs the whole backbone in each process: use plain data parallelism, as `accelerate launch "
    "--multi_gpu` starts it, with curvature_mode='recompute' and micro-batches to save memory"
)
# What `accelerate launch`, or its configuration file, sets in the environment; with the line of that file.
_VARIABLES: dict[str, tuple[str, str]] = {
    "ACCELERATE_USE_FSDP": ("distributed_type: FSDP", f"the model would be split up. {_WHOLE_MODELS}"),
    "ACCELERATE_USE_DEEPSPEED": ("distributed_type: DEEPSPEED", f"the model would be split up. {_WHOLE_MODELS}"),
    "ACCELERATE_USE_MEGATRON_LM": ("distributed_type: MEGATRON_LM", f"the model would be split up. {_WHOLE_MODELS}"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("parallelism_config", f"the model would be split up. {_WHOLE_MODELS}"),
    "ACCELERATE_DYNAMO_BACKEND": ("dynamo_config", SECOND_ORDER),
}
# What sets the compiler, which only second derivatives forbid.
COMPILER_VARIABLES = ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE")
_OFF = ("", "false", "no", "none", "0")


def refuse_launcher_settings(*, second_order: bool) -> None:
    """Refuses what splits the model up, or compiles one that is differentiated twice, where the launcher asks for it.

    Args:
        second_order (`bool`): whether a run takes second derivatives.

    Raises:
        `ValueError`: with the setting, the reason and what to use.
    """
    for name, (line, reason) in _VARIABLES.items():
        value = os.environ.get(name, "")
        if value.lower() not in _OFF and (second_order or name not in COMPILER_VARIABLES):
            raise ValueError(
                f"{name} is {value!r}, which is not supported: {reason}. Leave `{line}` out of the configuration of "
                "accelerate."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp8":
        raise ValueError(
            "ACCELERATE_MIXED_PRECISION is 'fp8', which is not supported: its layers have no second derivative. Set "
            "`mixed_precision: bf16` in the configuration of accelerate."
        )


def refuse_missing_devices(*, uses_cpu: bool, backend: str | None) -> None:
    """Refuses more processes on this machine than it has devices, as a configuration of accelerate that was made for
    another machine starts them. Each would train on its own, or fail in its first exchange.

    Args:
        uses_cpu (`bool`): whether the run is to use no device.
        backend (`str`, *optional*): of the exchange, where it is chosen; processes may share a device with `gloo`.

    Raises:
        `ValueError`: with the numbers, the file of accelerate and the ways out.
    """
    processes, devices = processes_here(), torch.accelerator.device_count()
    on_cpu = uses_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() not in _OFF
    if processes <= max(devices, 1) or on_cpu or (backend == "gloo" and devices):
        return
    raise ValueError(
        f"The launcher has started {processes} processes on this machine, one for each GPU, and torch finds "
        f"{devices or 'no'} GPU here. Start one process (`accelerate launch --cpu --num_processes 1`, or python "
        f"without a launcher), or set use_cpu to train on {processes} processes without GPUs. If these are the "
        f"numbers of {for_terminal(default_config_file)}, make that file anew with `accelerate config`."
    )


def check_whole_model(model: nn.Module, *, second_order: bool) -> None:
    """Refuses a model that is spread over devices, or compiled and to be differentiated twice.

    Args:
        model (`nn.Module`)
        second_order (`bool`): whether a run takes second derivatives.

    Raises:
        `ValueError`: with what to change.
    """
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise ValueError(
            f"The parameters are on {', '.join(sorted(devices))}. {_WHOLE_MODELS}. Load the models without device_map."
        )
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.tp_size not in (None, 1):
            raise ValueError(
                f"{name or 'The model'} is split by tensor parallelism over {module.tp_size} processes. "
                f"{_WHOLE_MODELS}. Load the models without tp_plan."
            )
        if second_order and getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"{name or 'The model'} is compiled, and {SECOND_ORDER}. Leave `compile()` out.")


def reduce_gradients_of(model: nn.Module, part: nn.Module) -> None:
    """Has DDP average the gradients of one part of a model and nothing else: the others would travel as zeros, and
    buffers, which would become those of the first process in each pass, are looked after by the trainers."""
    own = {id(parameter) for parameter in part.parameters()}
    others = [name for name, parameter in model.named_parameters() if id(parameter) not in own]
    others += [name for name, _ in model.named_buffers()]
    # 2026-11: torch 2.13 calls this a workaround until https://github.com/pytorch/pytorch/issues/43690 is closed.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, others)


def num_own_rows(accelerator: Any, rows: int) -> int:
    """Returns how many of the rows of a process's batch are its own. Accelerate fills the last batches of an
    evaluation with rows from the start, so that all processes have equal ones, and drops what comes of them when it
    gathers: by their places; `gradient_state` has all that is needed to know them."""
    state = accelerator.gradient_state
    if not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(state.remainder - accelerator.process_index * rows, 0), rows)


def pad_rows(results: Any, rows: int) -> Any:
    """Repeats the last row of each tensor until there are `rows`."""

    def pad(tensor: Tensor) -> Tensor:
        missing = rows - len(tensor)
        return tensor if missing <= 0 else tensor[[*range(len(tensor)), *[-1] * missing]]

    return recursively_apply(pad, results)
