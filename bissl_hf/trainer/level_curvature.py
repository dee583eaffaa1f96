"""The curvature of an upper phase and the linear systems with it, within the memory of the device."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.utils import logging

from ..bilevel.curvature import Curvature
from ..bilevel.curvature_memory import (
    available_bytes,
    extrapolate_bytes,
    halve,
    halvings_to_fit,
    has_own_memory,
    most_halvings,
    peak_growth,
)
from ..bilevel.gradient_cache import EmbeddingCurvature
from ..bilevel.hypergradient import implicit_gradient
from ..bilevel.linear_solve import SolveInfo, SolveStatus
from ..bilevel.recycling import Directions
from ..data.alternation import StepKey, Stream
from ..data.batches import batch_rows, split_rows
from ..distributed import alone, average_flat, largest_over_processes, world_size
from ..optim.precision import in_full_precision
from ..tensors import Vector, cosine
from .level_losses import LevelLosses

logger = logging.get_logger(__name__)

Batch = dict[str, Any]
Solved = TypeVar("Solved")


class LevelCurvature(LevelLosses):
    """The part of [`BiSSLTrainer`] that solves the linear systems of an upper phase.

    With `curvature_mode="auto"` the curvature keeps its graph while that fits. It gives way by halving: the curvature
    batch is taken in parts, one held at a time, where the loss is known as one of embeddings; any other loss frees its
    graph between products, and where it is a sum over micro-batches it is taken one by one.
    """

    _curvature: tuple[int, Curvature] | None = None
    _directions: tuple[int, Directions] | None = None
    # How often the curvature has given way. Saved with a checkpoint, so that a resume takes the same products; `None`
    # until the first upper step.
    curvature_halvings: int | None = None

    def leave_upper_phase(self) -> None:
        """Forgets what belongs to the lower model as it was."""
        self._curvature = self._directions = None

    # The curvature

    def _curvature_of(self, key: StepKey) -> Curvature:
        """Returns H of this alternation, linearised at its first upper step that is executed (after a resume, any)."""
        if self._curvature is None or self._curvature[0] != key.alternation:
            batch_key = key._replace(stream=int(Stream.CURVATURE), step=0)
            inputs = self.move_and_transform(
                self.sources[Stream.CURVATURE].read(batch_key), batch_key, self.lower_transform
            )
            with self.model_randomness(batch_key):
                if self.curvature_halvings is None:
                    self.curvature_halvings = self._find_halvings(inputs, batch_key)
                curvature = self._build_curvature(inputs, batch_key, self.curvature_halvings)
            self._curvature = (key.alternation, curvature)
        return self._curvature[1]

    def _directions_of(self, key: StepKey) -> Directions:
        """Returns what the solver has learned in this upper phase (after a resume, before it)."""
        if self._directions is None or self._directions[0] != key.alternation:
            self._directions = (key.alternation, Directions())
        return self._directions[1]

    def _build_curvature(self, inputs: Batch, key: StepKey, halvings: int = 0) -> Curvature:
        """Returns H of the loss that the lower steps take, on one batch. Under fp16 it is taken in float32: second
        derivatives overflow where first ones do not (docs/precision.md has figures)."""
        model, parameters = self.model.without_side_effects("lower"), self.model.lower_shared_parameters()
        if self.args.fp16:
            model = in_full_precision(model, self.args.device)
        rows = batch_rows(inputs)
        parts = split_rows(inputs, self._part_rows(rows, halvings))
        if len(parts) > 1 and self._takes_parts(rows):
            return EmbeddingCurvature(
                self._embed_parts(model, parts), self._loss_from_embeddings, parameters, reduce=average_flat
            )
        mode = self.args.curvature_mode
        if mode == "auto":
            mode = "recompute" if halvings else "cached"
        return Curvature(self.lower_loss_terms(model, inputs, key), parameters, mode=mode, reduce=average_flat)

    # Within the memory of the device

    def _takes_parts(self, rows: int) -> bool:
        """Whether the curvature of this loss can be taken in parts of the batch and stay that of the whole."""
        micro = self.args.lower_micro_batch_size
        loss_of_the_batch = self.args.lower_gradient_cache or micro is None or micro >= rows
        return loss_of_the_batch and self.knows_loss_of_embeddings()

    def _part_rows(self, rows: int, halvings: int) -> int:
        size = min(self.args.lower_micro_batch_size or rows, rows)
        return halve(size, halvings) if self._takes_parts(rows) else size

    def _most_halvings(self) -> int:
        if self.args.curvature_mode != "auto":
            return 0
        rows = self.sources[Stream.CURVATURE].batch_size // world_size()
        return most_halvings(self._part_rows(rows, 0)) if self._takes_parts(rows) else 1

    def _find_halvings(self, inputs: Batch, key: StepKey) -> int:
        """Returns how often the curvature must give way from the first, by an estimate, the same on each process.
        Several processes also try a product, each alone: in a real one they exchange embeddings, and one that ran out
        of memory would leave the others waiting."""
        most, device = self._most_halvings(), self.args.device
        if not most or not has_own_memory(device):
            return 0
        several = world_size() > 1
        with alone():
            halvings = min(self._estimate_halvings(inputs, key), most)
            while several and halvings < most and not self._fits(inputs, key, halvings):
                halvings += 1
        return largest_over_processes(halvings, device)

    def _estimate_halvings(self, inputs: Batch, key: StepKey) -> int:
        """Compares what a product would take, by measurements on small parts of the batch, with what is free."""

        def measure(rows: int) -> int:
            part, _ = split_rows(inputs, rows)[0]
            return peak_growth(lambda: self._take_product(part, key, 0), device)

        device, rows = self.args.device, batch_rows(inputs)
        needed = extrapolate_bytes(measure, self._part_rows(rows, 0) if self._takes_parts(rows) else rows)
        return 0 if needed is None else halvings_to_fit(needed, available_bytes(device))

    def _take_product(self, inputs: Batch, key: StepKey, halvings: int) -> None:
        curvature = self._build_curvature(inputs, key, halvings)
        curvature(curvature.gradient)

    def _fits(self, inputs: Batch, key: StepKey, halvings: int) -> bool:
        try:
            self._take_product(inputs, key, halvings)
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    def _within_memory(self, key: StepKey, solve: Callable[[Curvature, Directions], Solved]) -> Solved:
        """Returns `solve(curvature, directions)`. Where the device has too little memory for it the curvature gives
        way and the solve starts anew, without directions: those belong to other products."""
        while True:
            try:
                solved = solve(self._curvature_of(key), self._directions_of(key))
            except torch.OutOfMemoryError as error:
                # One process that tried again would leave the others waiting.
                if world_size() > 1 or (self.curvature_halvings or 0) >= self._most_halvings():
                    error.add_note(
                        "A product with the curvature did not fit the memory of the device. Set a smaller "
                        "curvature_batch_size, or lower_gradient_cache with a smaller lower_micro_batch_size."
                    )
                    raise
            else:
                self._warn_about_parts()
                return solved
            # Only here, outside the handler, are the tensors of the interrupted solve let go.
            self.leave_upper_phase()
            torch.cuda.empty_cache()
            self.curvature_halvings = (self.curvature_halvings or 0) + 1

    def _warn_about_parts(self) -> None:
        if not self.curvature_halvings:
            return
        rows = self.sources[Stream.CURVATURE].batch_size // world_size()
        taken = "Each product builds the graph anew, one micro-batch at a time."
        if self._takes_parts(rows):
            taken = (
                f"Each product takes it in parts of {self._part_rows(rows, self.curvature_halvings)}. The result is "
                "that of the whole batch, but batch norm takes its statistics, and dropout its masks, from the part."
            )
        logger.warning_once(
            f"The graph of the curvature batch ({rows} rows) does not fit the memory of the device. {taken} To choose "
            "yourself set curvature_mode, curvature_batch_size or lower_gradient_cache."
        )

    # The linear systems

    def solve(self, key: StepKey, rhs: Vector) -> Vector:
        """Returns (I + H/(lambda + delta))^-1 rhs in the step named by `key`, and notes how the solve went. A
        right-hand side that overflowed in fp16 comes back as it is, for the optimizer to skip the step. The loss scale
        of any other stays in it, since the solution is linear in it."""
        if self.loss_scale.overflowed(rhs):
            return rhs
        solution, info, alignment = self._within_memory(key, partial(self._solve, rhs))
        self.metrics_buffer.add("alignment/cosine", alignment)
        if self.args.solver != "identity":
            self.metrics_buffer.add("solver/iterations", info.iterations_tensor)
            self.metrics_buffer.add("solver/residual", info.residual_tensor)
            self.metrics_buffer.add("solver/cosine", cosine(solution, rhs))
            for position, status in enumerate(SolveStatus):
                if status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NON_FINITE):
                    self.metrics_buffer.add(f"solver/{status}", info.status_tensor == position)
        return solution

    def _solve(self, rhs: Vector, curvature: Curvature, directions: Directions) -> tuple[Vector, SolveInfo, Tensor]:
        args = self.args
        solution, info = implicit_gradient(
            curvature,
            rhs,
            proximal_weight=args.proximal_weight,
            damping=args.damping,
            max_iterations=args.solver_max_iterations,
            tolerance=args.solver_tolerance,
            solver=args.solver,
            memory=directions if args.solver == "recycled" else None,
        )
        return solution, info, cosine(curvature.gradient, rhs)
