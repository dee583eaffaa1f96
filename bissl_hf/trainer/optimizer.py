"""LARS, an optimizer for two levels, and how far each of them moves along a gradient."""

import ast
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

LEVELS = ("lower", "upper")


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
        `ValueError`: for an unknown name; `field` tells which argument to change.
    """
    known = torch_optimizers()
    if name.lower() not in known:
        raise ValueError(f"{field} is {name!r}; it must be one of {', '.join(sorted(known))}.")
    return known[name.lower()]


def parse_optimizer_options(text: str | None, *, field: str) -> dict[str, Any]:
    """Reads options such as `"nesterov=True,betas=(0.9,0.95)"`.

    Raises:
        `ValueError`: if the text is not a list of `name=value`; `field` tells which argument to change.
    """
    if not text:
        return {}
    try:
        call = ast.parse(f"options({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("not a list of name=value")
        return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f'{field} is {text!r}; it must read like "momentum=0.9,nesterov=True".') from error


def build_optimizer(
    name: str,
    parameters: Sequence[Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    options: dict[str, Any],
    field: str,
) -> Optimizer:
    """Builds an optimizer by name over one group that holds all parameters, so that all of them decay.

    Args:
        name (`str`): see [`torch_optimizers`].
        parameters (`Sequence[torch.Tensor]`): what it moves.
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


class TwoLevelOptimizer(Optimizer):
    """Chains the optimizers of both levels. A step moves those parameters only that have a gradient, and only the
    current level's have one: the other level's optimizer, its momentum included, stands still.

    `param_groups` holds the groups of the upper level, then those of the lower level, each tagged with its `"level"`.

    Args:
        upper (`torch.optim.Optimizer`), lower (`torch.optim.Optimizer`)
    """

    def __init__(self, upper: Optimizer, lower: Optimizer) -> None:
        self.upper, self.lower = upper, lower
        super().__init__([*upper.param_groups, *lower.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Makes a change to a group, of a schedule for example, reach the optimizer that owns it."""
        for level in LEVELS:
            for group in getattr(self, level).param_groups:
                group["level"] = level
        self.param_groups = [*self.upper.param_groups, *self.lower.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient.

        Raises:
            `ValueError`: if a closure is given: the two levels have no common loss.
        """
        if closure is not None:
            raise ValueError("closure is not supported: the two levels have no common loss.")
        for level in LEVELS:
            optimizer = getattr(self, level)
            if any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"]):
                optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of both optimizers."""
        return {level: getattr(self, level).state_dict() for level in LEVELS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the states of both optimizers."""
        for level in LEVELS:
            getattr(self, level).load_state_dict(state_dict[level])
        # torch puts new dictionaries in the place of the groups when it loads a state.
        self._share_groups()


def momentum_gain(optimizer: Optimizer) -> float:
    """Returns `1 / (1 - momentum)`: how much further a constant gradient carries with momentum than without."""
    momentum = optimizer.param_groups[0].get("momentum", 0.0)
    return 1.0 / (1.0 - momentum) if momentum < 1 else float("inf")


def clip_factor(size: Tensor, bound: float) -> Tensor:
    """Returns by how much a gradient of norm `size` is scaled to keep to `bound`; 1 where the bound is 0 (none)."""
    return torch.clamp(bound / (size + 1e-6), max=1.0) if bound else torch.ones_like(size)


def has_step_length(optimizer: Optimizer) -> bool:
    """Whether [`step_length`] knows this kind of optimizer."""
    return isinstance(optimizer, LARS | torch.optim.SGD | torch.optim.Adam | torch.optim.AdamW | torch.optim.NAdam)


def step_length(optimizer: Optimizer, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Returns the effective step length of one step at learning rate 1: by how much an entry moves per unit of
    gradient, averaged over the entries of `parameters`. Counts momentum, the trust ratio of LARS, and the scaling of
    Adam-like optimizers by the size of the gradient; it is 1 for plain SGD.

    Tensors that are all zero do not count under LARS: their trust ratio is 1 for the first step, and small ever after.
    Under Adam-like optimizers the mean is harmonic, for entries that hardly have a gradient would make any other one.

    Args:
        optimizer (`torch.optim.Optimizer`): LARS, SGD, Adam, AdamW or NAdam. Only its settings and second moments are
            read.
        parameters (`Sequence[torch.Tensor]`): the tensors of interest.
        gradients (`Sequence[torch.Tensor]`): their gradients; they stand in for second moments not collected yet.

    Returns:
        `torch.Tensor`: shape `()`.

    Raises:
        `ValueError`: for another kind of optimizer.
    """
    if not has_step_length(optimizer):
        raise ValueError(
            f"The effective step length of {type(optimizer).__name__} is not known; it is for LARS, SGD, Adam, AdamW "
            "and NAdam."
        )
    group = optimizer.param_groups[0]
    if isinstance(optimizer, LARS):
        mean = _mean_trust_ratio(group, parameters, gradients)
    elif "betas" in group:
        sizes = [
            (_second_moment(optimizer, p, g).sqrt() + group["eps"]).reshape(-1)
            for p, g in zip(parameters, gradients, strict=True)
        ]
        mean = 1.0 / torch.cat(sizes).mean()
    else:
        mean = torch.ones((), device=parameters[0].device)
    return mean * momentum_gain(optimizer)


def _mean_trust_ratio(group: dict[str, Any], parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    weights = [parameter.detach() for parameter in parameters]
    updates = torch._foreach_add(list(gradients), weights, alpha=group["weight_decay"])
    ratios = trust_ratios(weights, updates, group["trust_coefficient"])
    sizes = torch.tensor([weight.numel() for weight in weights], dtype=ratios.dtype)
    if group["exclude_bias_and_norm"]:
        excluded = torch.tensor([weight.ndim <= 1 for weight in weights])
        ratios = torch.where(excluded.to(ratios.device, non_blocking=True), 1.0, ratios)
    # A tensor that is all zero has no norm.
    counted = sizes.to(ratios.device, non_blocking=True) * (torch.stack(torch._foreach_norm(weights)) > 0)
    return (ratios * counted).sum() / counted.sum().clamp(min=1)


def _second_moment(optimizer: Optimizer, parameter: Tensor, gradient: Tensor) -> Tensor:
    """The bias-corrected mean of squared gradients, or the square of the gradient before the first step."""
    state = optimizer.state.get(parameter, {})
    if "exp_avg_sq" not in state:
        return gradient**2
    return state["exp_avg_sq"] / (1 - optimizer.param_groups[0]["betas"][1] ** float(state["step"]))
