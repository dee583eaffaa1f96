"""LARS, and any optimizer of torch by name."""

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_LONGEST_SHOWN = 200


def trust_ratios(parameters: Sequence[Tensor], updates: Sequence[Tensor], trust_coefficient: float) -> Tensor:
    """Returns `trust_coefficient * ||parameter|| / ||update||` of each tensor, or 1 where one of the norms is 0; shape
    `(number of tensors,)`."""
    weight_norms, update_norms = (torch.stack(torch._foreach_norm(list(x))) for x in (parameters, updates))
    ratios = trust_coefficient * weight_norms / update_norms
    return torch.where((weight_norms > 0) & (update_norms > 0), ratios, 1.0)


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888), as used for SimCLR in the BiSSL paper.

    For each tensor `w` with gradient `g`:  `d = g + weight_decay * w`,  `q = trust_coefficient * ||w|| / ||d||` (1
    where a norm is 0),  `m = momentum * m + q * d`,  `w = w - lr * m`.

    Args:
        params: parameters or parameter groups.
        lr (`float`): learning rate; not scaled by the batch.
        momentum (`float`, *optional*, defaults to 0.9)
        weight_decay (`float`, *optional*, defaults to 0.0)
        trust_coefficient (`float`, *optional*, defaults to 0.001): eta.
        exclude_bias_and_norm (`bool`, *optional*, defaults to `False`): leave tensors of at most one dimension without
            decay and adaptation, as most SimCLR recipes do. The paper leaves none out.

    Raises:
        `ValueError`: if a value is negative.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        exclude_bias_and_norm: bool = False,
    ) -> None:
        values = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        for name, value in values.items():
            if not value >= 0:
                raise ValueError(f"{name} is {value}; it must be at least 0.")
        super().__init__(params, {**values, "exclude_bias_and_norm": exclude_bias_and_norm})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            if moving:
                self._move(moving, group)
        return loss

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Moves all tensors of a group together: a handful of kernels on a GPU, whatever their number."""
        updates: list[Tensor] = [parameter.grad for parameter in parameters if parameter.grad is not None]
        adapted = [i for i, p in enumerate(parameters) if p.ndim > 1 or not group["exclude_bias_and_norm"]]
        if adapted:
            weights = [parameters[i] for i in adapted]
            decayed = torch._foreach_add([updates[i] for i in adapted], weights, alpha=group["weight_decay"])
            torch._foreach_mul_(decayed, trust_ratios(weights, decayed, group["trust_coefficient"]).unbind())
            for index, update in zip(adapted, decayed, strict=True):
                updates[index] = update
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, updates)
        torch._foreach_add_(parameters, momenta, alpha=-group["lr"])


def torch_optimizers() -> dict[str, type[Optimizer]]:
    """Returns the optimizers that can be named: LARS and those of `torch.optim`, under their names in lower case."""
    found: dict[str, type[Optimizer]] = {"lars": LARS}
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer:
            found[name.lower()] = value
    # Names of `transformers.TrainingArguments.optim` for the same classes.
    found |= {"adamw_torch": torch.optim.AdamW, "adamw_torch_fused": torch.optim.AdamW}
    # They need more than a gradient: a closure for line searches, or sparse gradients.
    for name in ("lbfgs", "sparseadam"):
        found.pop(name, None)
    return found


def resolve_optimizer(name: str, *, field: str) -> type[Optimizer]:
    """Returns the optimizer class called `name`.

    Raises:
        `ValueError`: for an unknown name; `field` names the argument to change.
    """
    known = torch_optimizers()
    if name.lower() not in known:
        raise ValueError(f"{field} is {name!r}; it must be one of {', '.join(sorted(known))}.")
    return known[name.lower()]


def parse_optimizer_options(text: str | None, *, field: str) -> dict[str, Any]:
    """Reads options such as `"nesterov=True,betas=(0.9,0.95)"`.

    Raises:
        `ValueError`: if the text is not a list of `name=value`, or a momentum never forgets; `field` names the
            argument to change.
    """
    if not text:
        return {}
    try:
        call = ast.parse(f"options({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("not a list of name=value")
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    # Thousands of signs or brackets are too deep for the parser, which says so by one of the last two.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        shown = repr(text) if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]!r}... ({len(text)} characters)"
        raise ValueError(f'{field} is {shown}; it must read like "momentum=0.9,nesterov=True".') from error
    momentum = options.get("momentum", 0.0)
    if isinstance(momentum, bool) or not isinstance(momentum, int | float) or not 0 <= momentum < 1:
        raise ValueError(f"{field} has momentum={momentum!r}; it must be a number of at least 0 and below 1.")
    return options


def build_optimizer(
    name: str,
    parameters: Sequence[Any],
    *,
    learning_rate: float,
    weight_decay: float,
    options: dict[str, Any],
    field: str,
) -> Optimizer:
    """Builds an optimizer by name over one group that holds all parameters, so that all of them decay.

    Args:
        name (`str`): see [`torch_optimizers`].
        parameters (`Sequence`): the tensors that it moves, or groups of them as dictionaries.
        learning_rate (`float`), weight_decay (`float`): as usual.
        options (`dict`): further arguments of the class; those that it does not take are an error.
        field (`str`): the argument that names the optimizer, for messages.

    Raises:
        `ValueError`: for an unknown name or option.
    """
    optimizer_class = resolve_optimizer(name, field=field)
    options = dict(options)
    if name.lower() == "adamw_torch_fused":
        options.setdefault("fused", True)
    accepted = inspect.signature(optimizer_class).parameters
    free = set(accepted) - {"params", "lr", "weight_decay"}
    unknown = sorted(set(options) - free)
    if unknown:
        raise ValueError(
            f"{optimizer_class.__name__} (from {field}={name!r}) does not take {', '.join(unknown)} as options; it "
            f"takes {', '.join(sorted(free))}."
        )
    if weight_decay and "weight_decay" not in accepted:
        raise ValueError(f"{optimizer_class.__name__} (from {field}={name!r}) takes no weight decay; set it to 0.")
    decay: dict[str, Any] = {"weight_decay": weight_decay} if "weight_decay" in accepted else {}
    try:
        return optimizer_class(list(parameters), lr=learning_rate, **decay, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{optimizer_class.__name__} (from {field}={name!r}) refuses {options}: {error}") from error


def takes_momentum(name: str, *, field: str) -> bool:
    """Whether the optimizer called `name` has an argument `momentum`."""
    return "momentum" in inspect.signature(resolve_optimizer(name, field=field)).parameters
