"""The losses of both levels on a batch, in parts where that is asked for, and their gradients."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..bilevel.gradient_cache import Embed, embedding_gradients
from ..data.alternation import StepKey, Stream, read_rows
from ..data.batches import split_rows
from ..tensors import Vector, add_scaled, at_least_float32, fill_missing
from .level_evaluation import LevelEvaluation
from .resumable_trainer import Transform

LossModel = Callable[..., Any]
Parts = list[tuple[dict[str, Any], float]]


class LevelLosses(LevelEvaluation):
    """The part of [`BiSSLTrainer`] that knows the losses."""

    lower_transform: Transform | None = None
    train_transform: Transform | None = None

    # What to override for another pair of tasks

    def compute_lower_loss(self, model: LossModel, inputs: dict[str, Any]) -> Tensor:
        """Returns the pretext loss L_P, the mean over this process's rows, shape `()`. It may be called several times
        per step and must not have side effects.

        Args:
            model (`Callable`): the lower model; takes the inputs as keyword arguments.
            inputs (`dict`): a batch of the lower data set, on the device.
        """
        return model(**inputs).loss

    def compute_upper_loss(self, model: LossModel, inputs: dict[str, Any]) -> Tensor:
        """Returns the downstream loss L_D, the mean over this process's rows, shape `()`. It is called with two
        models: that of (theta_D, phi_D) and the aligned one of (theta_P, phi_D).

        Args:
            model (`Callable`): takes the inputs as keyword arguments.
            inputs (`dict`): a batch of the labelled data set, on the device.
        """
        return model(**inputs).loss

    def check_gradient_cache(self) -> None:
        """Refuses `lower_gradient_cache` where the lower loss is not known as a loss of embeddings.

        Raises:
            `ValueError`: with what is missing.
        """
        if not self.args.lower_gradient_cache:
            return
        lower = type(self.model.lower)
        if not hasattr(lower, "loss_from_embeddings"):
            raise ValueError(
                f"lower_gradient_cache needs a lower model with `loss_from_embeddings`, which {lower.__name__} does "
                "not have. Leave lower_gradient_cache out: each part of a lower batch then has a loss of its own."
            )
        if not self._takes_loss_of_model():
            raise ValueError(
                "lower_gradient_cache takes the loss from the lower model's `loss_from_embeddings` and would pass "
                f"over the compute_lower_loss of {type(self).__name__}. Put the loss into the model, or leave "
                "lower_gradient_cache out."
            )

    def knows_loss_of_embeddings(self) -> bool:
        """Whether the lower loss can be taken from embeddings of parts of a batch."""
        return hasattr(self.model.lower, "loss_from_embeddings") and self._takes_loss_of_model()

    def _takes_loss_of_model(self) -> bool:
        """Whether nobody has put another lower loss in the place of the model's, in a subclass or on this trainer."""
        return getattr(self.compute_lower_loss, "__func__", None) is LevelLosses.compute_lower_loss

    def lower_loss_terms(self, model: LossModel, inputs: dict[str, Any], key: StepKey) -> list[Callable[[], Tensor]]:
        """Returns a term for each part of a lower batch, to be called in their order in the random state of `key`. The
        terms add up to the lower loss, in value and in gradient: with `lower_gradient_cache` to that of the whole
        batch, else to the mean of the losses of its parts."""
        parts = split_rows(inputs, self.args.lower_micro_batch_size)
        if not self.args.lower_gradient_cache or len(parts) == 1:
            return [partial(self._lower_term, model, part, share) for part, share in parts]
        with self.model_randomness(key):
            without_graph = self._embed_parts(self.model.without_side_effects("lower"), parts)
            loss, gradients = embedding_gradients(without_graph, self._loss_from_embeddings)
        return [
            partial(self._cached_term, embed, gradient, share * loss)
            for embed, gradient, (_, share) in zip(self._embed_parts(model, parts), gradients, parts, strict=True)
        ]

    def _lower_term(self, model: LossModel, part: dict[str, Any], share: float) -> Tensor:
        with self.accelerator.autocast():
            return self.compute_lower_loss(model, part) * share

    @staticmethod
    def _cached_term(embed: Embed, gradient: Tensor, value: Tensor) -> Tensor:
        """A number of this value whose gradient is J^T `gradient`, J that of the embeddings."""
        product = (embed() * gradient).sum()
        return product + (value - product).detach()

    def _embed_parts(self, model: LossModel, parts: Parts) -> list[Embed]:
        return [partial(self._embed, model, part) for part, _ in parts]

    def _embed(self, model: LossModel, part: dict[str, Any]) -> Tensor:
        with self.accelerator.autocast():
            return at_least_float32(model(**part, return_loss=False).embeddings)

    def _loss_from_embeddings(self, embeddings: Tensor) -> Tensor:
        lower: Any = self.model.lower
        with self.accelerator.autocast():
            return lower.loss_from_embeddings(embeddings)

    def _upper_gradient(
        self, model: LossModel, inputs: dict[str, Any], parameters: tuple[Tensor, ...], *, differentiate: bool = True
    ) -> tuple[Tensor, Vector]:
        """Returns the upper loss of a model and its gradient, with the loss scale of fp16; no gradient (an empty
        vector) if not asked for. The gradient is linear in the rows, so parts of a batch add up to it exactly."""
        total = torch.zeros((), device=self.args.device)
        gradient: Vector = ()
        for part, share in split_rows(inputs, self.args.upper_micro_batch_size):
            with torch.set_grad_enabled(differentiate), self.accelerator.autocast():
                loss = self.compute_upper_loss(model, part) * share
            total = total + loss.detach()
            if differentiate:
                scaled = self.loss_scale(loss)
                found = fill_missing(torch.autograd.grad(scaled, parameters, allow_unused=True), parameters)
                gradient = tuple(g.detach() for g in found) if not gradient else add_scaled(gradient, found, 1.0)
        return total, gradient

    @torch.no_grad()
    def try_losses(self, rows: int) -> None:
        """Computes both losses on the first rows, without side effects, so that data and models that do not fit come
        to light before training.

        Args:
            rows (`int`): how many rows of each data set to take.
        """
        for stream, level, transform, loss in (
            (Stream.LOWER, "lower", self.lower_transform, self.compute_lower_loss),
            (Stream.UPPER, "aligned", self.train_transform, self.compute_upper_loss),
        ):
            source = self.sources[stream]
            key = StepKey(self.args.key_seed, int(stream), 0, 0, 0)
            inputs = source.collator(read_rows(source.dataset, range(min(rows, len(source.dataset)))))
            with self.model_randomness(key), self.accelerator.autocast():
                loss(self.model.without_side_effects(level), self.move_and_transform(inputs, key, transform))
