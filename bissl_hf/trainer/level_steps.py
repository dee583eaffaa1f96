"""The steps of both levels: what [`BiSSLTrainer`] does with one batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.alternation import StepKey, Stream
from ..distributed import average_flat
from ..models.batch_norm import running_statistics
from ..tensors import Vector, add_scaled, dot, fill_missing, subtract
from .level_curvature import LevelCurvature


class LevelSteps(LevelCurvature):
    """The part of [`BiSSLTrainer`] that takes steps: it leaves gradients on the parameters of one level, and the
    optimizer does the rest."""

    _current_level: str = "lower"

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Leaves the gradients of one lower or one upper step on that level's parameters, as the batch's key says."""
        key = inputs["key"]
        model.train()
        self._current_level = "lower" if key.stream == Stream.LOWER else "upper"
        transform = self.lower_transform if key.stream == Stream.LOWER else self.train_transform
        batch = self.move_and_transform(inputs["inputs"], key, transform)
        self.count_samples(batch)
        if key.stream == Stream.LOWER:
            self.leave_upper_phase()
            if key.step == 0:
                self._adapt_upper(key.alternation)
            with self.model_randomness(key):
                return self._lower_step(model, batch, key)
        with self.model_randomness(key):
            loss = self._upper_step(batch, key)
        if key.step == self.args.upper_steps - 1:
            self.leave_upper_phase()
        return loss

    def _lower_step(self, model: nn.Module, inputs: dict[str, Any], key: StepKey) -> Tensor:
        """Gradient of  L_P(theta_P, phi_P) + lambda/2 ||theta_P - theta_D||^2  (section 2 of the paper)."""
        loss = torch.zeros((), device=self.args.device)
        terms = self.lower_loss_terms(partial(model, level="lower"), inputs, key)
        for index, term in enumerate(terms):
            with self._synchronised_if(index == len(terms) - 1, model):
                part_loss = term()
                self.accelerator.backward(part_loss)
            loss = loss + part_loss.detach()

        average_flat([], in_place=running_statistics(self.model.lower))
        theta_p, theta_d = self.model.lower_shared_parameters(), self.model.upper_shared_parameters()
        pull = subtract([p.detach() for p in theta_p], [p.detach() for p in theta_d])
        gradients = fill_missing([p.grad for p in theta_p], [p.detach() for p in theta_p])
        force = [self.loss_scale(part) for part in pull]
        for parameter, gradient in zip(theta_p, add_scaled(gradients, force, self.args.proximal_weight), strict=True):
            parameter.grad = gradient
        self.metrics_buffer.add("loss", loss)
        self.metrics_buffer.add("lower/loss", loss)
        self.metrics_buffer.add("lower/proximal", 0.5 * self.args.proximal_weight * dot(pull, pull))
        return loss

    @contextmanager
    def _synchronised_if(self, synchronised: bool, model: nn.Module) -> Iterator[None]:
        """Averages gradients over processes in the last part of a batch only."""
        if synchronised:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def _upper_step(self, inputs: dict[str, Any], key: StepKey) -> Tensor:
        """Hypergradient (section 2 of the paper):
        g_theta = x + gamma grad_theta L_D(theta_D, phi_D)  with  (I + H/(lambda + delta)) x = grad_theta L_D(theta_P,
        phi_D), g_phi = grad_phi L_D(theta_P, phi_D) + gamma grad_phi L_D(theta_D, phi_D).
        """
        args = self.args
        theta_p, theta_d = self.model.lower_shared_parameters(), self.model.upper_shared_parameters()
        phi_d = self.model.upper_head_parameters()
        loss, at_theta_p = self._upper_gradient(self.model.without_side_effects("aligned"), inputs, (*theta_p, *phi_d))
        direct_loss, at_theta_d = self._upper_gradient(
            self.model.upper, inputs, (*theta_d, *phi_d), differentiate=args.direct_weight > 0
        )
        reduced = average_flat([*at_theta_p, *at_theta_d], in_place=running_statistics(self.model.upper))
        at_theta_p, at_theta_d = reduced[: len(at_theta_p)], reduced[len(at_theta_p) :]
        rhs = at_theta_p[: len(theta_p)]
        solution = self.solve(key, rhs)
        gradient: Vector = (*solution, *at_theta_p[len(theta_p) :])
        if at_theta_d:
            gradient = add_scaled(gradient, at_theta_d, args.direct_weight)
        for parameter, value in zip((*theta_d, *phi_d), gradient, strict=True):
            parameter.grad = value

        self.metrics_buffer.add("loss", loss)
        self.metrics_buffer.add("upper/loss", loss)
        self.metrics_buffer.add("upper/direct_loss", direct_loss)
        return loss

    @torch.no_grad()
    def _adapt_upper(self, alternation: int) -> None:
        """theta_D <- (1 - s) theta_D + s theta_P at the start of every so many alternations (off by default)."""
        every = self.args.upper_adaptation_every
        if every and alternation and alternation % every == 0:
            theta_p, theta_d = self.model.lower_shared_parameters(), self.model.upper_shared_parameters()
            torch._foreach_lerp_(list(theta_d), list(theta_p), self.args.upper_adaptation_strength)
