"""One upper phase: the curvature that all its steps share, what the solver remembers, and the linear systems.

H depends on the lower model and the curvature batch only, so it is linearised once per alternation. The phase keeps
within the memory of the device: where a product runs out of it, the curvature batch is taken in parts.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from ..data.alternation import StepKey, Stream
from ..data.batches import batch_rows, split_rows
from ..data.streams import Inputs, Streams, model_randomness
from ..distributed import average_flat, world_size
from ..models.convex_outputs import convex_outputs
from ..tensors import Vector, cosine, norm
from .curvature import Curvature
from .empirical_fisher import EmpiricalFisher
from .gauss_newton import GaussNewton
from .gradient_cache import EmbeddingCurvature
from .hypergradient import SOLVERS, Memory, implicit_gradient
from .level_losses import LevelLosses, LossModel, LossOfEmbeddingsError, in_full_precision
from .linear_solve import SolveInfo

logger = logging.get_logger(__name__)

# Parts are not made smaller: their kernels would be mostly overhead, and batch norm would see too few rows.
MIN_PART_ROWS = 8


@dataclass(frozen=True)
class SolveSettings:
    """How linear systems are solved; see the fields of these names of [`BiSSLTrainingArguments`].

    Args:
        solver, max_iterations, tolerance: see [`implicit_gradient`].
        memory_size (`int`): gradients that `"mfac"` keeps.
        per_tensor (`bool`): whether `"mfac"` solves a system of its own for each tensor.
        curvature_kind (`str`): `"hessian"`, or `"gauss_newton"`, which is never indefinite.
        curvature_mode (`str`): `"cached"`, `"recompute"`, or `"auto"`: cached, and in parts once memory runs out.
        full_precision (`bool`): take second derivatives in float32 whatever surrounds them (under fp16).
    """

    solver: str
    max_iterations: int
    tolerance: float
    curvature_mode: str
    curvature_kind: str = "hessian"
    memory_size: int = 20
    per_tensor: bool = False
    full_precision: bool = False


@dataclass(frozen=True)
class Solve:
    """The solution of a system, and how it was found.

    Args:
        solution (`tuple[torch.Tensor, ...]`): x.
        info ([`SolveInfo`], *optional*): of the solve; `None` if there was none.
        alignment (`torch.Tensor`, *optional*): cosine between the pretext gradient and the right-hand side, `()`.
        pretext_norm (`torch.Tensor`, *optional*): norm of the pretext gradient on the curvature batch, `()`, with
            solvers that take products.
    """

    solution: Vector
    info: SolveInfo | None = None
    alignment: Tensor | None = None
    pretext_norm: Tensor | None = None


class UpperPhase:
    """Solves the linear systems of an upper phase.

    Args:
        losses ([`LevelLosses`])
        streams ([`Streams`]): with `Stream.CURVATURE`.
        settings ([`SolveSettings`])

    Raises:
        `ValueError`: for a Gauss-Newton matrix of a loss that is not known as one of convex outputs.
    """

    def __init__(self, losses: LevelLosses, streams: Streams, settings: SolveSettings) -> None:
        self.outputs = convex_outputs(losses.model.lower) if settings.curvature_kind == "gauss_newton" else None
        if settings.curvature_kind == "gauss_newton":
            _check_outputs(losses, known=self.outputs is not None)
        self.losses, self.streams, self.settings = losses, streams, settings
        # How often the part of the curvature batch that is held at once was halved. Saved, so that a resume takes the
        # same products.
        self.halvings = 0
        self.takes_products = SOLVERS[settings.solver].second_order
        self.damps = settings.solver not in ("identity", "none")
        self._memory = self._new_memory()
        # Of the last lower step, for solvers that take no products: they have no gradient on a curvature batch.
        self._lower_gradient: Vector | None = None
        self._loss_has_parts = losses.has_loss_of_embeddings
        self._alternation: int | None = None
        self._curvature: Curvature | None = None

    def _new_memory(self) -> Memory | None:
        kind = SOLVERS[self.settings.solver].memory
        if kind is EmpiricalFisher:
            return EmpiricalFisher(self.settings.memory_size, per_tensor=self.settings.per_tensor)
        return None if kind is None else kind()

    def record(self, gradient: Vector, *, is_last: bool) -> None:
        """Takes note of the pretext gradient of a lower step, for solvers that take no products.

        Args:
            gradient (`tuple[torch.Tensor, ...]`): in theta_P, without the proximal term and the loss scale, averaged
                over processes.
            is_last (`bool`): whether it is the last lower step of its alternation.
        """
        if isinstance(self._memory, EmpiricalFisher):
            self._memory.record(gradient)
        if is_last:
            self._lower_gradient = gradient

    def solve(self, key: StepKey, rhs: Vector, *, proximal_weight: float, damping: float) -> Solve:
        """Solves  (I + H / (lambda + delta)) x = grad_theta L_D(theta_P, phi_D).

        Args:
            key ([`StepKey`]): of the upper step; the alternation in it names the curvature.
            rhs (`tuple[torch.Tensor, ...]`): the right-hand side, averaged over processes. A loss scale may be left in
                it: the solution is linear in it.
            proximal_weight (`float`): lambda.
            damping (`float`): delta.

        Raises:
            `torch.OutOfMemoryError`: if a product does not fit the device, with the settings to change in a note.
        """
        halvings = self.halvings
        while True:
            try:
                solve = self._solve(key.alternation, rhs, proximal_weight, damping)
                if self.halvings > halvings:
                    self._warn_about_parts()
                return solve
            except torch.OutOfMemoryError as error:
                # One process that tried again would leave the others waiting.
                if world_size() > 1 or self.halvings >= self._most_halvings():
                    error.add_note(
                        "A product with the curvature did not fit the memory of the device. Set a smaller "
                        "curvature_batch_size, or lower_gradient_cache with a smaller lower_micro_batch_size."
                    )
                    raise
            except LossOfEmbeddingsError:
                if self.losses.gradient_cache:
                    raise
                self._loss_has_parts = False
                self._forget()
                continue
            # Only here, outside the handler, are the tensors of the interrupted solve released.
            self._forget()
            torch.cuda.empty_cache()
            self.halvings += 1

    def _solve(self, alternation: int, rhs: Vector, proximal_weight: float, damping: float) -> Solve:
        curvature = self.curvature(alternation) if self.takes_products else None
        solution, info = implicit_gradient(
            curvature,
            rhs,
            proximal_weight=proximal_weight,
            damping=damping,
            max_iterations=self.settings.max_iterations,
            tolerance=self.settings.tolerance,
            solver=self.settings.solver,
            memory=self._memory,
        )
        # solution and rhs: one tensor per shared parameter; the pretext gradient, too
        pretext = self._lower_gradient if curvature is None else curvature.gradient
        size = None if curvature is None else norm(curvature.gradient)
        return Solve(solution, info, None if pretext is None else cosine(pretext, rhs), size)

    def leave(self) -> None:
        """Forgets what belongs to the lower model as it was."""
        self._alternation = self._lower_gradient = None
        self._forget()

    def _forget(self) -> None:
        self._curvature = None
        if SOLVERS[self.settings.solver].lasts_a_phase:
            self._memory = self._new_memory()

    # The curvature

    def curvature(self, alternation: int) -> Curvature:
        """Returns H of an alternation, linearised when it is first asked for (after a resume, at any upper step)."""
        if self._alternation != alternation:
            self._forget()
            self._alternation = alternation
        if self._curvature is None:
            key = self.streams.key(Stream.CURVATURE, alternation)
            inputs = self.streams.read(key)
            with model_randomness(key):
                self._curvature = self._build_curvature(inputs, key)
        return self._curvature

    def _build_curvature(self, inputs: Inputs, key: StepKey) -> Curvature:
        """Returns H of the loss that the lower steps take, on one batch. Under fp16 it is taken in float32: second
        derivatives overflow where first ones do not (docs/precision.md has figures)."""
        losses = self.losses
        model, parameters = losses.model.without_side_effects("lower"), losses.model.backbone_parameters("lower")
        if self.settings.full_precision:
            model = in_full_precision(model, losses.model.device)
        rows = batch_rows(inputs)
        parts = split_rows(inputs, self._part_rows(rows))
        mode = self.settings.curvature_mode
        if mode == "auto":
            mode = "recompute" if self.halvings else "cached"
        if self.outputs is not None:
            return GaussNewton(
                [partial(self._rows_of, model, part) for part, _ in parts],
                losses.loss_of_outputs(self.outputs, inputs),
                parameters,
                mode=mode,
                join=self.outputs.join,
                reduce=average_flat,
            )
        if len(parts) > 1 and self._takes_parts(rows):
            embed_parts = [partial(losses.embed, model, part) for part, _ in parts]
            return EmbeddingCurvature(embed_parts, losses.loss_of_embeddings(inputs), parameters, reduce=average_flat)
        return Curvature(losses.lower_terms(model, inputs, key), parameters, mode=mode, reduce=average_flat)

    def _rows_of(self, model: LossModel, part: Inputs) -> Tensor:
        if self.outputs is None:
            raise RuntimeError("There are no outputs in which the lower loss is convex.")
        with self.losses.autocast():
            return self.outputs.rows(model, part)

    # Within the memory of the device

    def _takes_parts(self, rows: int) -> bool:
        """Whether the curvature of this loss can be taken in parts of the batch and stay that of the whole."""
        if self.outputs is not None:
            return True
        micro = self.losses.lower_micro_batch_size
        loss_of_the_batch = self.losses.gradient_cache or micro is None or micro >= rows
        return loss_of_the_batch and self._loss_has_parts

    def _part_rows(self, rows: int) -> int:
        size = min(self.losses.lower_micro_batch_size or rows, rows)
        return -(-size // 2**self.halvings) if self._takes_parts(rows) else size

    def _most_halvings(self) -> int:
        """How often parts can be halved: until they are too small, or once where the loss has no parts."""
        if self.settings.curvature_mode != "auto":
            return 0
        rows = self._curvature_rows()
        if not self._takes_parts(rows):
            return 1
        size = min(self.losses.lower_micro_batch_size or rows, rows)
        return max(0, int(math.log2(max(size, 1) / MIN_PART_ROWS)))

    def _curvature_rows(self) -> int:
        return self.streams.sources[Stream.CURVATURE].batch_size // world_size()

    def _warn_about_parts(self) -> None:
        rows = self._curvature_rows()
        taken = "Each product builds the graph anew, one micro-batch at a time."
        if self._takes_parts(rows):
            taken = (
                f"Each product takes it in parts of {self._part_rows(rows)}. The result is that of the whole batch, "
                "but batch norm takes its statistics, and dropout its masks, from the part."
            )
        logger.warning_once(
            f"The graph of the curvature batch ({rows} rows) does not fit the memory of the device. {taken} To choose "
            "yourself set curvature_mode, curvature_batch_size or lower_gradient_cache."
        )

    # For a resume

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resume inside an upper phase needs: how the curvature fits the device, and what the solver
        remembers."""
        state: dict[str, Any] = {"halvings": self.halvings, "alternation": self._alternation}
        if self._memory is not None and len(self._memory):
            state["memory"] = self._memory.state_dict()
        if self._lower_gradient is not None:
            state["lower_gradient"] = {str(index): part for index, part in enumerate(self._lower_gradient)}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self._forget()
        if self.settings.curvature_mode == "auto":
            self.halvings = state["halvings"]
        self._alternation = state["alternation"]
        if self._memory is not None and "memory" in state:
            self._memory.load_state_dict(state["memory"])
        if "lower_gradient" in state:
            parts = state["lower_gradient"]
            self._lower_gradient = tuple(parts[str(index)] for index in range(len(parts)))


def _check_outputs(losses: LevelLosses, *, known: bool) -> None:
    lower = type(losses.model.lower).__name__
    if not known:
        raise ValueError(
            f"curvature_kind is 'gauss_newton', and it is not known in which of its outputs the loss of {lower} is "
            "convex: it needs the methods outputs_from_embeddings and loss_from_outputs. Set curvature_kind to "
            "'hessian', or solver to one that takes no products."
        )
    if losses.lower_micro_batch_size is not None and not losses.gradient_cache:
        raise ValueError(
            "curvature_kind is 'gauss_newton', and with lower_micro_batch_size each part of a batch has a loss of its "
            "own. Set lower_gradient_cache, or curvature_kind to 'hessian'."
        )
