"""The steps of both levels: what [`BiSSLTrainer`] does with one batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..data.alternation import StepKey, Stream, read_rows
from ..distributed import average_flat
from ..gradient_cache import Embed, EmbeddingCurvature, embedding_gradients
from ..hypergradient import Curvature, implicit_gradient
from ..linear_solve import SolveStatus
from ..models.batch_norm import running_statistics
from ..recycling import Directions
from ..tensors import Vector, add_scaled, at_least_float32, cosine, dot, fill_missing, subtract
from .batches import split_rows
from .keyed_trainer import Transform
from .level_evaluation import LevelEvaluation
from .precision import in_full_precision

LossModel = Callable[..., Any]
Parts = list[tuple[dict[str, Any], float]]


class LevelSteps(LevelEvaluation):
    """The part of [`BiSSLTrainer`] that computes losses and gradients. It leaves them on the parameters of one level;
    the optimizer does the rest."""

    lower_transform: Transform | None = None
    train_transform: Transform | None = None
    _current_level: str = "lower"
    _curvature: tuple[int, Curvature] | None = None
    _directions: tuple[int, Directions] | None = None

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
        if type(self).compute_lower_loss is not LevelSteps.compute_lower_loss:
            raise ValueError(
                "lower_gradient_cache takes the loss from the lower model's `loss_from_embeddings` and would pass "
                f"over the compute_lower_loss of {type(self).__name__}. Put the loss into the model, or leave "
                "lower_gradient_cache out."
            )

    # Steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Leaves the gradients of one lower or one upper step on that level's parameters, as the batch's key says."""
        key = inputs["key"]
        model.train()
        self._current_level = "lower" if key.level == Stream.LOWER else "upper"
        transform = self.lower_transform if key.level == Stream.LOWER else self.train_transform
        batch = self.move_and_transform(inputs["inputs"], key, transform)
        self.count_samples(batch)
        if key.level == Stream.LOWER:
            self._leave_upper_phase()
            if key.step == 0:
                self._adapt_upper(key.alternation)
            with self.model_randomness(key):
                return self._lower_step(model, batch, key)
        curvature, directions = self._curvature_of(key), self._directions_of(key)
        with self.model_randomness(key):
            loss = self._upper_step(curvature, directions, batch)
        if key.step == self.args.upper_steps - 1:
            self._leave_upper_phase()
        return loss

    def _leave_upper_phase(self) -> None:
        """Forgets what belongs to the lower model as it was."""
        self._curvature = self._directions = None

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

    def lower_loss_terms(self, model: LossModel, inputs: dict[str, Any], key: StepKey) -> list[Callable[[], Tensor]]:
        """Returns a term for each part of a lower batch, to be called in their order in the random state of `key`. The
        terms add up to the lower loss, in value and in gradient: with `lower_gradient_cache` to that of the whole
        batch, else to the mean of the losses of its parts."""
        parts = split_rows(inputs, self.args.lower_micro_batch_size)
        if not self.args.lower_gradient_cache or len(parts) == 1:
            return [partial(self._lower_term, model, part, share) for part, share in parts]
        with self.model_randomness(key):
            without_graph = self._embed_parts(self.model.pure("lower"), parts)
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

    @contextmanager
    def _synchronised_if(self, synchronised: bool, model: nn.Module) -> Iterator[None]:
        """Averages gradients over processes in the last part of a batch only."""
        if synchronised:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def _curvature_of(self, key: StepKey) -> Curvature:
        """Returns H of this alternation, linearised at its first upper step that is executed (after a resume, any)."""
        if self._curvature is None or self._curvature[0] != key.alternation:
            batch_key = key._replace(level=int(Stream.CURVATURE), step=0)
            inputs = self.move_and_transform(
                self.sources[Stream.CURVATURE].read(batch_key), batch_key, self.lower_transform
            )
            with self.model_randomness(batch_key):
                curvature = self._build_curvature(inputs, batch_key)
            self._curvature = (key.alternation, curvature)
        return self._curvature[1]

    def _directions_of(self, key: StepKey) -> Directions:
        """Returns what the solver has learned in this upper phase (after a resume, before it)."""
        if self._directions is None or self._directions[0] != key.alternation:
            self._directions = (key.alternation, Directions())
        return self._directions[1]

    def _build_curvature(self, inputs: dict[str, Any], key: StepKey) -> Curvature:
        """Returns H of the loss that the lower steps take, on one batch. Under fp16 it is taken in float32: second
        derivatives overflow where first ones do not (docs/precision.md has figures)."""
        model, parameters = self.model.pure("lower"), self.model.lower_shared_parameters()
        if self.args.fp16:
            model = in_full_precision(model, self.args.device)
        parts = split_rows(inputs, self.args.lower_micro_batch_size)
        if self.args.lower_gradient_cache and len(parts) > 1:
            return EmbeddingCurvature(
                self._embed_parts(model, parts), self._loss_from_embeddings, parameters, reduce=average_flat
            )

        def lower_loss() -> Tensor:
            return torch.stack([term() for term in self.lower_loss_terms(model, inputs, key)]).sum()

        return Curvature(lower_loss, parameters, mode=self.args.curvature_mode, reduce=average_flat)

    def _upper_step(self, curvature: Curvature, directions: Directions, inputs: dict[str, Any]) -> Tensor:
        """Hypergradient (section 2 of the paper):
        g_theta = x + gamma grad_theta L_D(theta_D, phi_D)  with  (I + H/(lambda + delta)) x = grad_theta L_D(theta_P,
        phi_D), g_phi = grad_phi L_D(theta_P, phi_D) + gamma grad_phi L_D(theta_D, phi_D).
        """
        args = self.args
        theta_p, theta_d = self.model.lower_shared_parameters(), self.model.upper_shared_parameters()
        phi_d = self.model.upper_head_parameters()
        loss, at_theta_p = self._upper_gradient(self.model.pure("aligned"), inputs, (*theta_p, *phi_d))
        direct_loss, at_theta_d = self._upper_gradient(
            self.model.upper, inputs, (*theta_d, *phi_d), differentiate=args.direct_weight > 0
        )
        reduced = average_flat([*at_theta_p, *at_theta_d], in_place=running_statistics(self.model.upper))
        at_theta_p, at_theta_d = reduced[: len(at_theta_p)], reduced[len(at_theta_p) :]
        rhs = at_theta_p[: len(theta_p)]
        solution = self._solve(curvature, directions, rhs)
        gradient: Vector = (*solution, *at_theta_p[len(theta_p) :])
        if at_theta_d:
            gradient = add_scaled(gradient, at_theta_d, args.direct_weight)
        for parameter, value in zip((*theta_d, *phi_d), gradient, strict=True):
            parameter.grad = value

        self.metrics_buffer.add("loss", loss)
        self.metrics_buffer.add("upper/loss", loss)
        self.metrics_buffer.add("upper/direct_loss", direct_loss)
        return loss

    def _solve(self, curvature: Curvature, directions: Directions, rhs: Vector) -> Vector:
        """Returns (I + H/(lambda + delta))^-1 rhs, and notes how the solve went. A right-hand side that overflowed in
        fp16 comes back as it is, for the optimizer to skip the step. The loss scale of any other stays in it, since
        the solution is linear in it."""
        if self.loss_scale.overflowed(rhs):
            return rhs
        args = self.args
        solution, info = implicit_gradient(
            curvature,
            rhs,
            proximal_weight=args.proximal_weight,
            damping=args.damping,
            max_iterations=args.solver_max_iterations,
            tolerance=args.solver_tolerance,
            solver=args.solver,
            directions=directions,
        )
        self.metrics_buffer.add("alignment/cosine", cosine(curvature.gradient, rhs))
        if args.solver != "identity":
            self.metrics_buffer.add("solver/iterations", info.iterations_tensor)
            self.metrics_buffer.add("solver/residual", info.residual_tensor)
            for position, status in enumerate(SolveStatus):
                if status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NON_FINITE):
                    self.metrics_buffer.add(f"solver/{status}", info.status_tensor == position)
        return solution

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
    def _adapt_upper(self, alternation: int) -> None:
        """theta_D <- (1 - s) theta_D + s theta_P at the start of every so many alternations (off by default)."""
        every = self.args.upper_adaptation_every
        if every and alternation and alternation % every == 0:
            theta_p, theta_d = self.model.lower_shared_parameters(), self.model.upper_shared_parameters()
            torch._foreach_lerp_(list(theta_d), list(theta_p), self.args.upper_adaptation_strength)

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
                loss(self.model.pure(level), self.move_and_transform(inputs, key, transform))
