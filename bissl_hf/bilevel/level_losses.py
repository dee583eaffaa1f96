"""The losses of both levels on a batch, in parts where that is asked for, and their gradients.

The two losses themselves are handed in as functions `loss(model, inputs)`, so that any pair of tasks can be trained.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..data.alternation import StepKey
from ..data.batches import split_rows
from ..data.streams import Inputs, model_randomness
from ..models.convex_outputs import ConvexOutputs
from ..models.modeling_bissl import BiSSLModel
from ..tensors import Vector, add_scaled, at_least_float32, fill_missing
from .gradient_cache import Embed, embedding_gradients

LossModel = Callable[..., Any]
LossHook = Callable[[LossModel, Inputs], Tensor]
_CANNOT = (
    "of its batch, which a loss taken from embeddings of parts cannot do. Leave lower_gradient_cache out, or write "
    "the loss with the `loss` and `embeddings` of one call of the model on the batch."
)


class LossOfEmbeddingsError(ValueError):
    """The lower loss is no function of the embeddings of a batch, so it cannot be taken from parts of it."""


class LossScaling(Protocol):
    """What the algorithm asks of the loss scale of fp16; without a scale nothing is scaled."""

    def __call__(self, tensor: Tensor) -> Tensor: ...

    def overflowed(self, gradient: Vector) -> bool: ...

    def step(self, optimizer: torch.optim.Optimizer) -> None: ...


class LevelLosses:
    """Value and gradient of the pretext loss L_P and of the downstream loss L_D.

    Args:
        model ([`BiSSLModel`]): both levels.
        lower_loss, upper_loss (`Callable`): `loss(model, inputs)` returns the mean over this process's rows, a tensor
            of shape `()`, without side effects.
        autocast (`Callable`): returns the context in which models run.
        loss_scale ([`LossScaling`]): of fp16.
        lower_micro_batch_size, upper_micro_batch_size (`int`, *optional*): largest part of a batch to hold at once.
        gradient_cache (`bool`): whether the parts of a lower batch give the loss of the whole batch. The lower loss
            then sees the whole batch through a model that returns the embeddings of its parts (see
            [`~LevelLosses.loss_of_embeddings`]).

    Raises:
        `ValueError`: if the gradient cache is asked for and the lower model has no `loss_from_embeddings`.
    """

    def __init__(
        self,
        model: BiSSLModel,
        *,
        lower_loss: LossHook,
        upper_loss: LossHook,
        autocast: Callable[[], AbstractContextManager[Any]],
        loss_scale: LossScaling,
        lower_micro_batch_size: int | None = None,
        upper_micro_batch_size: int | None = None,
        gradient_cache: bool = False,
    ) -> None:
        self.model, self.autocast, self.loss_scale = model, autocast, loss_scale
        self._lower_loss, self._upper_loss = lower_loss, upper_loss
        self.lower_micro_batch_size, self.upper_micro_batch_size = lower_micro_batch_size, upper_micro_batch_size
        self.gradient_cache = gradient_cache
        self._is_loss_of_embeddings = False
        if gradient_cache and not self.has_loss_of_embeddings:
            raise ValueError(
                f"lower_gradient_cache needs a lower model with `loss_from_embeddings`, which "
                f"{type(model.lower).__name__} does not have. Leave lower_gradient_cache out: each part of a lower "
                "batch then has a loss of its own."
            )

    @property
    def has_loss_of_embeddings(self) -> bool:
        """Whether the lower model has a loss of embeddings, which can be taken from parts of a batch."""
        return hasattr(self.model.lower, "loss_from_embeddings")

    # The lower level

    def lower_terms(self, model: LossModel, inputs: Inputs, key: StepKey) -> list[Callable[[], Tensor]]:
        """Returns a term for each part of a lower batch, to be called in their order in the random state of `key`. The
        terms add up to the lower loss, in value and in gradient: with the gradient cache to that of the whole batch,
        else to the mean of the losses of its parts.

        Args:
            model (`Callable`): the lower model.
            inputs (`dict`): a batch, on the device.
            key ([`StepKey`]): of the batch.
        """
        parts = split_rows(inputs, self.lower_micro_batch_size)
        if not self.gradient_cache or len(parts) == 1:
            return [partial(self._lower_term, model, part, share) for part, share in parts]
        with model_randomness(key):
            without_graph = [partial(self.embed, self.model.without_side_effects("lower"), part) for part, _ in parts]
            # loss (), gradients of each part (rows, dims)
            loss, gradients = embedding_gradients(without_graph, self.loss_of_embeddings(inputs))
        return [
            partial(_term_of_gradient, partial(self.embed, model, part), gradient, share * loss)
            for (part, share), gradient in zip(parts, gradients, strict=True)
        ]

    def _lower_term(self, model: LossModel, part: Inputs, share: float) -> Tensor:
        with self.autocast():
            return self._lower_loss(model, part) * share

    def embed(self, model: LossModel, part: Inputs) -> Tensor:
        """Returns the embeddings of one part of a lower batch, shape `(rows, ...)`, at least in float32."""
        with self.autocast():
            return at_least_float32(model(**part, return_loss=False).embeddings)

    def loss_of_embeddings(self, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        """Returns the lower loss of a batch as a function of its embeddings, shape `(rows, ...)`.

        The loss is the one handed in: it is called with a model whose output has the `loss` and the `embeddings` that
        belong to these embeddings. It may read, weigh and combine them, but neither run the model on other inputs nor
        use parameters itself.

        Args:
            inputs (`dict`): the batch that the embeddings come from.
        """
        lower: Any = self.model.lower

        def loss_fn(embeddings: Tensor) -> Tensor:
            def model(**given: Any) -> Any:
                if any(value is not inputs.get(name) for name, value in given.items() if name != "return_loss"):
                    raise LossOfEmbeddingsError(f"compute_lower_loss runs the model on other inputs {_CANNOT}")
                return SimpleNamespace(loss=lower.loss_from_embeddings(embeddings), embeddings=embeddings)

            with self.autocast():
                loss = self._lower_loss(model, inputs)
            self._check_loss_of_embeddings(loss)
            return loss

        return loss_fn

    def _check_loss_of_embeddings(self, loss: Tensor) -> None:
        """Refuses a loss in which parameters occur beside the embeddings: their gradient would be lost. Once."""
        if self._is_loss_of_embeddings or not loss.requires_grad:
            return
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if any(gradient is not None for gradient in found):
            raise LossOfEmbeddingsError(f"compute_lower_loss uses parameters beside the embeddings {_CANNOT}")
        self._is_loss_of_embeddings = True

    def loss_of_outputs(self, outputs: ConvexOutputs, inputs: Inputs) -> Callable[[Tensor], Tensor]:
        """Returns the lower loss of a batch as a function of the outputs in which it is convex. The loss is the one
        handed in, as in [`~LevelLosses.loss_of_embeddings`]; it may weigh and log the `loss` of the model."""

        def loss_fn(values: Tensor) -> Tensor:
            def model(**given: Any) -> Any:
                if any(value is not inputs.get(name) for name, value in given.items()):
                    raise LossOfEmbeddingsError(f"compute_lower_loss runs the model on other inputs {_CANNOT}")
                return SimpleNamespace(loss=outputs.loss(values, inputs))

            with self.autocast():
                return self._lower_loss(model, inputs)

        return loss_fn

    # The upper level

    def upper_gradient(
        self, model: LossModel, inputs: Inputs, parameters: tuple[Tensor, ...], *, differentiate: bool = True
    ) -> tuple[Tensor, Vector]:
        """Returns the upper loss of a model and its gradient, with the loss scale of fp16. The gradient is linear in
        the rows, so parts of a batch add up to it exactly.

        Args:
            model (`Callable`): theta_D's or the aligned one.
            inputs (`dict`): a labelled batch, on the device.
            parameters (`tuple[torch.Tensor, ...]`): what to differentiate in.
            differentiate (`bool`, *optional*, defaults to `True`): if false the gradient is an empty vector.
        """
        total = torch.zeros((), device=self.model.device)
        gradient: Vector = ()  # over `parameters`, the sum over the parts so far
        for part, share in split_rows(inputs, self.upper_micro_batch_size):
            with torch.set_grad_enabled(differentiate), self.autocast():
                loss = self._upper_loss(model, part) * share
            total = total + loss.detach()
            if differentiate:
                scaled = self.loss_scale(loss)
                found = fill_missing(torch.autograd.grad(scaled, parameters, allow_unused=True), parameters)
                gradient = tuple(g.detach() for g in found) if not gradient else add_scaled(gradient, found, 1.0)
        return total, gradient

    @torch.no_grad()
    def try_on(self, lower: tuple[Inputs, StepKey], upper: tuple[Inputs, StepKey]) -> dict[str, Tensor]:
        """Computes both losses once, without side effects, so that data and models that do not fit fail before
        training.

        Args:
            lower, upper (`tuple[dict, StepKey]`): a batch of each level with its key.

        Returns:
            `dict[str, torch.Tensor]`: the losses of the levels `"lower"` and `"upper"`, of shape `()`.
        """
        found: dict[str, Tensor] = {}
        for (inputs, key), level, loss in ((lower, "lower", self._lower_loss), (upper, "aligned", self._upper_loss)):
            with model_randomness(key), self.autocast():
                found["lower" if level == "lower" else "upper"] = loss(self.model.without_side_effects(level), inputs)
        return found


def _term_of_gradient(embed: Embed, gradient: Tensor, value: Tensor) -> Tensor:
    """A number of this value whose gradient is J^T `gradient`, J that of the embeddings."""
    product = (embed() * gradient).sum()
    return product + (value - product).detach()


def in_full_precision(model: LossModel, device: torch.device) -> LossModel:
    """Returns a model's forward pass with autocast off, whatever surrounds it."""

    def forward(**inputs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return model(**inputs)

    return forward
