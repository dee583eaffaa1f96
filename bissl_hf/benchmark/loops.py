"""Alternations written out in plain PyTorch, to compare the trainer with.

`BareLoop` does the same arithmetic as the trainer, with the same parts of this package. `Baseline` is how one would
write the paper's description down: views by Pillow in worker processes, float32, the graph of the pretext gradient
rebuilt for every product, the loss read in every step. `KeptGraphBaseline` is the same by an author who knows that the
graph can be kept, in bfloat16 and channels-last if asked for.
"""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..bilevel.curvature import Curvature
from ..bilevel.empirical_fisher import EmpiricalFisher
from ..bilevel.gauss_newton import GaussNewton
from ..bilevel.hypergradient import SOLVERS, Memory, implicit_gradient
from ..bilevel.linear_solve import SolveInfo
from ..data.alternation import StepKey, Stream
from ..models.convex_outputs import convex_outputs
from ..models.memory_format import to_channels_last
from ..models.modeling_bissl import BiSSLModel
from ..optim.optimizers import LARS
from ..tensors import Vector, add_scaled, dot, fill_missing, subtract
from ..trainer.bissl_trainer import BiSSLTrainer
from ..trainer.training_args import BiSSLTrainingArguments
from .pillow_views import PillowViews
from .workload import SMALL_RATE

Batch = dict[str, Any]
PHASES = ("lower", "upper")
_STREAMS = (Stream.LOWER, Stream.CURVATURE, Stream.UPPER)


class PlainLoop(ABC):
    """One alternation after another on the data and settings of a trainer, without it.

    Args:
        trainer ([`BiSSLTrainer`]): gives data and transforms.
        model ([`BiSSLModel`]): on the trainer's device. It is moved, but hardly.
        args ([`BiSSLTrainingArguments`], *optional*): settings, those of the trainer if not given.
    """

    reads_losses = False
    takes_products = True

    def __init__(self, trainer: BiSSLTrainer, model: BiSSLModel, args: BiSSLTrainingArguments | None = None) -> None:
        self.trainer, self.model, self.args = trainer, model, args or trainer.args
        self.device = trainer.args.device
        self.theta_p, self.theta_d = model.backbone_parameters("lower"), model.backbone_parameters("upper")
        self.phi_d = model.head_parameters("upper")
        self.lower_parameters = (*self.theta_p, *model.head_parameters("lower"))
        self.upper_parameters = (*self.theta_d, *self.phi_d)
        self.lower_optimizer = LARS(self.lower_parameters, lr=SMALL_RATE, weight_decay=self.args.lower_weight_decay)
        self.upper_optimizer = torch.optim.SGD(
            self.upper_parameters, lr=SMALL_RATE, momentum=0.9, weight_decay=self.args.weight_decay
        )
        self.proximal_weight, self.damping = float(self.args.proximal_weight or 0), float(self.args.damping or 0)
        self.alternations = 0
        # Seconds spent waiting for workers so far.
        self.waited = 0.0

    @abstractmethod
    def batches(self, stream: Stream) -> Iterator[Batch]:
        """Yields one batch per step of this alternation, on the device."""

    @abstractmethod
    def implicit_gradient(self, batch: Batch, rhs: Vector) -> Vector:
        """Returns x of the linear system whose matrix the curvature batch fixes."""

    def alternation(self) -> None:
        """Takes all steps of one alternation."""
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[str]:
        """Takes one alternation step by step, and names the phase of each step after it."""
        self.model.train()
        for phase, steps in zip(PHASES, (self.lower_steps(), self.upper_steps()), strict=True):
            for _ in steps:
                yield phase
        self.alternations += 1

    def lower_steps(self) -> Iterator[None]:
        """Takes the lower steps one by one."""
        for batch in self.batches(Stream.LOWER):
            self.lower_step(batch)
            yield

    def upper_steps(self) -> Iterator[None]:
        """Takes the upper steps one by one."""
        curvature_batch = next(self.batches(Stream.CURVATURE)) if self.takes_products else {}
        for batch in self.batches(Stream.UPPER):
            self.upper_step(curvature_batch, batch)
            yield

    def lower_step(self, batch: Batch) -> None:
        """One step on the pretext loss and the proximal term."""
        loss, gradient = self.forward_backward(batch)
        self.record(gradient[: len(self.theta_p)])
        pull = subtract([p.detach() for p in self.theta_p], [p.detach() for p in self.theta_d])
        shared = add_scaled(gradient[: len(pull)], pull, self.proximal_weight)
        self.move(self.lower_optimizer, (*shared, *gradient[len(pull) :]))
        if self.reads_losses:
            loss.item()

    def record(self, gradient: Vector) -> None:
        """Takes note of a pretext gradient in theta_P, for solvers that use it."""
        return

    def upper_step(self, curvature_batch: Batch, batch: Batch) -> None:
        """One step along the hypergradient."""
        loss, at_theta_p = self.gradient(
            self.model.without_side_effects("aligned"), batch, (*self.theta_p, *self.phi_d)
        )
        _, at_theta_d = self.gradient(self.model.upper, batch, self.upper_parameters)
        shared = len(self.theta_p)
        solution = self.implicit_gradient(curvature_batch, at_theta_p[:shared])
        gradient = add_scaled((*solution, *at_theta_p[shared:]), at_theta_d, self.args.direct_weight)
        self.move(self.upper_optimizer, gradient)
        if self.reads_losses:
            loss.item()

    def forward_backward(self, batch: Batch) -> tuple[Tensor, Vector]:
        """Returns the pretext loss and its gradient."""
        return self.gradient(partial(self.model, level="lower"), batch, self.lower_parameters)

    def gradient(
        self, model: Callable[..., Any], batch: Batch, parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, Vector]:
        """Returns the loss of a model and its gradient."""
        loss = self.loss(model, batch)
        return loss.detach(), fill_missing(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)

    def loss(self, model: Callable[..., Any], batch: Batch) -> Tensor:
        """Returns the loss of a model with its graph, in the precision of the loop."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            return model(**batch).loss

    def move(self, optimizer: torch.optim.Optimizer, gradient: Vector) -> None:
        """Clips a gradient and moves the parameters of an optimizer along it."""
        parameters = optimizer.param_groups[0]["params"]
        for parameter, value in zip(parameters, gradient, strict=True):
            parameter.grad = value
        torch.nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


class BareLoop(PlainLoop):
    """The trainer's arithmetic: views on the device, the gradient linearised once per phase. Its `curvature_kind` and
    its solver are those of `args`."""

    _curvature: Curvature | None = None

    def __init__(self, trainer: BiSSLTrainer, model: BiSSLModel, args: BiSSLTrainingArguments | None = None) -> None:
        super().__init__(trainer, model, args)
        self.solves: list[SolveInfo] = []
        self.takes_products = SOLVERS[self.args.solver].second_order
        self._memory = self._new_memory()

    def _new_memory(self) -> Memory | None:
        kind = SOLVERS[self.args.solver].memory
        if kind is EmpiricalFisher:
            return EmpiricalFisher(self.args.solver_memory)
        return None if kind is None else kind()

    def record(self, gradient: Vector) -> None:
        if isinstance(self._memory, EmpiricalFisher):
            self._memory.record(gradient)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        for step in range(self.trainer.streams.sources[stream].steps_per_alternation):
            key = StepKey(self.args.key_seed, int(stream), self.alternations, step, 0)
            yield self.views(self.trainer.streams.sources[stream].read(key), key)

    def views(self, inputs: Batch, key: StepKey) -> Batch:
        """Moves a batch to the device and makes its views there."""
        return self.trainer.streams.prepare(inputs, key)

    def implicit_gradient(self, batch: Batch, rhs: Vector) -> Vector:
        if self._curvature is None and self.takes_products:
            self._curvature = self.curvature(batch)
        solution, info = implicit_gradient(
            self._curvature,
            rhs,
            proximal_weight=self.proximal_weight,
            damping=self.damping,
            max_iterations=self.args.solver_max_iterations,
            tolerance=self.args.solver_tolerance,
            solver=self.args.solver,
            memory=self._memory,
        )
        self.solves.append(info)
        return solution

    def curvature(self, batch: Batch, *, mode: str = "cached") -> Curvature:
        """Returns the curvature on a batch."""
        model = self.model.without_side_effects("lower")
        if self.args.curvature_kind == "gauss_newton":
            return self._gauss_newton(batch, mode=mode)
        return Curvature(partial(self.loss, model, batch), self.theta_p, mode=mode)

    def _gauss_newton(self, batch: Batch, *, mode: str) -> GaussNewton:
        model, outputs = self.model.without_side_effects("lower"), convex_outputs(self.model.lower)
        if outputs is None:
            raise ValueError(
                f"The outputs in which the loss of {type(self.model.lower).__name__} is convex are unknown."
            )

        def rows() -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                return outputs.rows(model, batch)

        def loss(values: Tensor) -> Tensor:
            return outputs.loss(values, batch)

        return GaussNewton(rows, loss, self.theta_p, mode=mode, join=outputs.join)

    def upper_steps(self) -> Iterator[None]:
        yield from super().upper_steps()
        self._curvature = None
        if SOLVERS[self.args.solver].lasts_a_phase:
            self._memory = self._new_memory()


class Baseline(PlainLoop):
    """The paper's description, plainly. Its model must be float32.

    Args:
        trainer ([`BiSSLTrainer`]), model ([`BiSSLModel`]): see [`PlainLoop`].
        workers (`int`): processes that make the views of each stream.
    """

    reads_losses = True

    def __init__(self, trainer: BiSSLTrainer, model: BiSSLModel, *, workers: int) -> None:
        args = copy.copy(trainer.args)
        args.bf16 = False
        super().__init__(trainer, model, args)
        size = trainer.streams.transform(Stream.LOWER).image_size  # type: ignore[union-attr]
        self._steps = {stream: trainer.streams.sources[stream].steps_per_alternation for stream in _STREAMS}
        # The iterators live as long as the loop: no worker starts twice, and all prepare batches ahead.
        self._loaders: dict[Stream, Iterator[Batch]] = {}
        self.datasets: dict[Stream, PillowViews] = {}
        for stream in _STREAMS:
            source = trainer.streams.sources[stream]
            views = self.datasets[stream] = PillowViews(source.dataset, size, two_views=stream != Stream.UPPER)
            loader = DataLoader(
                views,
                batch_size=source.batch_size,
                sampler=_Forever(len(views)),
                num_workers=workers if stream == Stream.LOWER else min(workers, 1),
                pin_memory=self.device.type == "cuda",
            )
            self._loaders[stream] = iter(loader)

    def batches(self, stream: Stream) -> Iterator[Batch]:
        for _ in range(self._steps[stream]):
            start = time.perf_counter()
            batch = next(self._loaders[stream])
            self.waited += time.perf_counter() - start
            yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def close(self) -> None:
        """Ends the workers."""
        self._loaders.clear()

    def product(self, batch: Batch, vector: Vector) -> Vector:
        """H times a vector, from a new graph."""
        return torch.autograd.grad(self._gradient_with_graph(batch), self.theta_p, vector)

    def _gradient_with_graph(self, batch: Batch) -> Vector:
        loss = self.loss(self.model.without_side_effects("lower"), batch)
        return torch.autograd.grad(loss, self.theta_p, create_graph=True)

    def implicit_gradient(self, batch: Batch, rhs: Vector) -> Vector:
        """Conjugate gradient on  (I + H / (lambda + delta)) x = rhs."""
        scale = 1.0 / (self.proximal_weight + self.damping)

        def matvec(vector: Vector) -> Vector:
            return add_scaled(vector, self.product(batch, vector), scale)

        return plain_conjugate_gradient(matvec, rhs, self.args.solver_max_iterations)


class KeptGraphBaseline(Baseline):
    """The baseline with the graph of the pretext gradient kept for all products of a phase.

    Args:
        trainer ([`BiSSLTrainer`]), model ([`BiSSLModel`]), workers (`int`): see [`Baseline`].
        bf16 (`bool`, *optional*, defaults to `False`): compute in bfloat16 and channels-last.
    """

    _graph: Vector | None = None

    def __init__(self, trainer: BiSSLTrainer, model: BiSSLModel, *, workers: int, bf16: bool = False) -> None:
        super().__init__(trainer, model, workers=workers)
        self.args.bf16 = bf16
        if bf16:
            to_channels_last(model)

    def product(self, batch: Batch, vector: Vector) -> Vector:
        if self._graph is None:
            self._graph = self._gradient_with_graph(batch)
        return torch.autograd.grad(self._graph, self.theta_p, vector, retain_graph=True)

    def upper_steps(self) -> Iterator[None]:
        yield from super().upper_steps()
        self._graph = None


def plain_conjugate_gradient(matvec: Callable[[Vector], Vector], rhs: Vector, iterations: int) -> Vector:
    """Conjugate gradient from zero, as textbooks write it."""
    solution = tuple(torch.zeros_like(tensor) for tensor in rhs)
    residual = direction = rhs
    square = dot(residual, residual)
    for _ in range(iterations):
        image = matvec(direction)
        step = square / dot(direction, image)
        solution = tuple(torch.addcmul(x, p, step) for x, p in zip(solution, direction, strict=True))
        residual = tuple(torch.addcmul(r, q, -step) for r, q in zip(residual, image, strict=True))
        previous, square = square, dot(residual, residual)
        ratio = square / previous
        direction = tuple(torch.addcmul(r, p, ratio) for r, p in zip(residual, direction, strict=True))
    return solution


class _Forever(Sampler[int]):
    """Row numbers of one permutation after another."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(self._rows, generator=generator).tolist()
