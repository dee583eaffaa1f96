"""The trainer of the bilevel problem: alternations of lower and upper steps as epochs of a `transformers.Trainer`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, default_data_collator
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging
from transformers.utils.generic import find_labels

from ..bilevel.head_warmup import warm_up_head
from ..bilevel.level_losses import LevelLosses, LossModel
from ..bilevel.linear_solve import SolveStatus, sufficient_damping
from ..bilevel.upper_phase import Solve, UpperPhase
from ..cards.record import RunRecord
from ..data.alternation import AlternatingDataLoader, KeyedSource, StepKey, Stream
from ..data.decoded import decoded_for
from ..data.streams import (
    Inputs,
    Transform,
    check_map_style,
    check_pretext_batch,
    labelled_batch_size,
    model_randomness,
)
from ..distributed import average_flat
from ..evaluation.monitors import EmbeddingMonitor
from ..models.batch_norm import check_rows_for_batch_norm, has_batch_norm, recalibrate_batch_norm, running_statistics
from ..models.modeling_bissl import BiSSLModel
from ..optim.pull import (
    ProximalWeight,
    Pull,
    clip_factor,
    estimate_pull,
    has_step_length,
    horizon_damping,
    warn_about_pull,
)
from ..optim.two_level import LEVELS, TwoLevelOptimizer, own_step, two_level_scheduler
from ..tasks.class_weights import DownstreamLoss
from ..tasks.image_task import ImageTask
from ..tensors import Vector, add_scaled, cosine, dot, fill_missing, is_finite, norm, subtract
from .divergence import check_first_batch
from .export_level import better_level
from .from_task import filled_from_task
from .given import check_arguments, check_rows, evaluate_nothing_without_data, refuse_loss_hooks
from .resumable_trainer import ResumableTrainer
from .run_record import record_run, size_of
from .smoothing import check_smoothing, smoothed_loss
from .training_args import BiSSLTrainingArguments

logger = logging.get_logger(__name__)

_HOOKS = "override compute_upper_loss(model, inputs) or compute_lower_loss(model, inputs) in its place"
_NO_SEARCH = "Train once per setting in a loop, each into a folder of its own, or run `bissl-hf study`."


class BiSSLTrainer(ResumableTrainer):
    """Solves the bilevel problem of BiSSL (arXiv 2410.02387).

    One epoch of the Trainer is one alternation: `lower_steps` steps on the pretext loss pulled towards theta_D, then
    `upper_steps` steps on the downstream loss along the hypergradient. To train another pair of tasks override
    [`~BiSSLTrainer.compute_lower_loss`] and [`~BiSSLTrainer.compute_upper_loss`].

    Args:
        model ([`BiSSLModel`]): both levels.
        args ([`BiSSLTrainingArguments`])
        task ([`ImageTask`], *optional*): data, transforms, metrics and image processor; what is given beside it counts
            in its place.
        train_dataset, eval_dataset: labelled, map-style data sets of the upper level. A `datasets.Dataset` with a
            column of images is decoded for its transform.
        lower_dataset: map-style data set of the lower level.
        data_collator, lower_data_collator (`Callable`, *optional*): stack rows into a dictionary of tensors.
        train_transform, eval_transform, lower_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`,
            run on the device and deterministic in the key.
        class_weights (`str` or `Sequence[float]`, *optional*): of the downstream loss, see [`DownstreamLoss`].
        callbacks (`list`, *optional*): as in `transformers.Trainer`.
        **trainer_kwargs: further arguments of `transformers.Trainer` (`processing_class`, `compute_metrics`, ...).

    Raises:
        `TypeError`: for a model, arguments, data sets or rows of another kind, or a hook of `transformers.Trainer` in
            the place of [`~BiSSLTrainer.compute_lower_loss`] and [`~BiSSLTrainer.compute_upper_loss`].
        `ValueError`: for data sets that are missing, empty or smaller than a pretext batch, rows without labels or
            with labels out of range, a frozen backbone, or a lower model that does not fit `lower_gradient_cache`.

    Example:

    ```python
    >>> trainer = BiSSLTrainer(
    ...     model=BiSSLModel.from_models(lower, upper),
    ...     args=BiSSLTrainingArguments(output_dir="aligned"),
    ...     train_dataset=labelled,
    ...     lower_dataset=unlabelled,
    ...     eval_dataset=validation,
    ... )  # doctest: +SKIP
    >>> trainer.train()  # doctest: +SKIP
    ```
    """

    args: BiSSLTrainingArguments
    model: BiSSLModel

    @filled_from_task(ImageTask.bilevel_arguments)
    def __init__(
        self,
        model: BiSSLModel | None = None,
        args: BiSSLTrainingArguments | None = None,
        *,
        task: ImageTask | None = None,
        train_dataset: Any = None,
        lower_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        lower_data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        lower_transform: Transform | None = None,
        class_weights: str | Sequence[float] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        model, args = self._checked(model, args, class_weights, trainer_kwargs)
        if eval_dataset is None and args.export_level == "best":
            raise ValueError(
                "export_level is 'best', and there is no eval_dataset to find the better level; pass one, or set "
                "export_level to aligned or upper."
            )
        evaluate_nothing_without_data(args, eval_dataset)
        for name, dataset in (("train_dataset", train_dataset), ("lower_dataset", lower_dataset)):
            if dataset is not None:
                check_map_style(dataset, name=name)
        self.lower_dataset = decoded_for(lower_dataset, lower_transform, labelled=False)
        super().__init__(
            model=model,
            args=args,
            train_dataset=decoded_for(train_dataset, train_transform),
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            eval_transform=eval_transform,
            callbacks=[*(callbacks or []), _BeforeFirstAlternation(self), _AfterLowerStep(self)],
            **trainer_kwargs,
        )
        if args.label_names is None:
            self.label_names = find_labels(type(model.upper))
        if train_dataset is not None or lower_dataset is not None:
            args.remove_unused_columns = args.remove_unused_columns and not (train_transform or lower_transform)
            self._add_streams(lower_data_collator or default_data_collator, train_transform, lower_transform)
        self.downstream_loss = DownstreamLoss(class_weights, config=model.upper.config, dataset=train_dataset)
        self.losses = self._build_losses()
        self.upper_phase = UpperPhase(self.losses, self.streams, args.solve_settings())
        self.pull, self.weight = Pull(), ProximalWeight(args.proximal_weight, args.target_pull)
        self.monitor = EmbeddingMonitor()
        for name, owner in (
            ("pull", self.pull),
            ("proximal_weight", self.weight),
            ("upper_phase", self.upper_phase),
            ("embeddings", self.monitor),
        ):
            self.checkpoints.register(name, owner)
        self._level = "lower"
        self._damping: float | None = None
        self._start: Vector | None = None
        # Of the matrices met so far, and whether a warning has named a damping that would have been enough.
        self._lowest_quotient, self._has_warned = torch.zeros((), dtype=torch.float64), False
        self._head_is_warm = False

    def _build_losses(self) -> LevelLosses:
        return LevelLosses(
            self.model,
            # Looked up at each call, so that a hook may be replaced on the object, too.
            lower_loss=lambda level_model, inputs: self.compute_lower_loss(level_model, inputs),
            upper_loss=lambda level_model, inputs: self.compute_upper_loss(level_model, inputs),
            autocast=self.accelerator.autocast,
            loss_scale=self.loss_scale,
            lower_micro_batch_size=self.args.lower_micro_batch_size,
            upper_micro_batch_size=self.args.upper_micro_batch_size,
            gradient_cache=self.args.lower_gradient_cache,
        )

    def _checked(
        self, model: Any, args: Any, class_weights: Any, trainer_kwargs: dict[str, Any]
    ) -> tuple[BiSSLModel, BiSSLTrainingArguments]:
        """Returns model and arguments once they are of the kind that this trainer takes."""
        if trainer_kwargs.pop("model_init", None) is not None:
            raise TypeError(f"model_init is not used by BiSSLTrainer; pass a model. {_NO_SEARCH}")
        if not isinstance(model, BiSSLModel):
            raise TypeError(
                f"model is a {type(model).__name__}; it must be a BiSSLModel (see BiSSLModel.from_models)."
            )
        check_arguments(args, BiSSLTrainingArguments, BiSSLTrainer)
        refuse_loss_hooks(type(self), BiSSLTrainer, trainer_kwargs, _HOOKS)
        frozen = [
            f"{level}.{name}"
            for level in LEVELS
            for name, parameter in getattr(model, level).base_model.named_parameters()
            if name in model.shared_parameter_names and not parameter.requires_grad
        ]
        if frozen:
            raise ValueError(
                f"{len(frozen)} parameters of the backbone are frozen, such as {frozen[0]}; theta_P and theta_D must "
                "be trainable. Make them so (requires_grad_(True)), or freeze them in both models before "
                "BiSSLModel.from_models, which leaves them out of the backbone."
            )
        if args.label_smoothing_factor:
            check_smoothing(model.upper, class_weights)
        return model, args

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: a trial would need a new pair of models and new streams.

        Raises:
            `NotImplementedError`: with what to do instead.
        """
        raise NotImplementedError(f"hyperparameter_search is not offered by BiSSLTrainer. {_NO_SEARCH}")

    # What to override for another pair of tasks

    def compute_lower_loss(self, model: LossModel, inputs: Inputs) -> Tensor:
        """Returns the pretext loss L_P, the mean over this process's rows, shape `()`. It may be called several times
        per step and must not have side effects.

        Args:
            model (`Callable`): the lower model; takes the inputs as keyword arguments.
            inputs (`dict`): a batch of the lower data set, on the device.
        """
        return model(**inputs).loss

    def compute_upper_loss(self, model: LossModel, inputs: Inputs) -> Tensor:
        """Returns the downstream loss L_D, the mean over this process's rows, shape `()`. It is called with two
        models: that of (theta_D, phi_D) and the aligned one of (theta_P, phi_D).

        Args:
            model (`Callable`): takes the inputs as keyword arguments.
            inputs (`dict`): a batch of the labelled data set, on the device.
        """
        if self.downstream_loss.weights is not None:
            return self.downstream_loss(model, inputs)
        return smoothed_loss(model(**inputs), inputs, self.label_smoother, self.model.upper)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Has Trainer report the loss that is trained, that of `compute_upper_loss`, in evaluations. Predictions are
        the outputs of its first call of the model."""
        outputs: list[Any] = []

        def recorded(**given: Any) -> Any:
            outputs.append(model(**given))
            return outputs[-1]

        loss = self.compute_upper_loss(recorded, inputs)
        if not return_outputs:
            return loss
        return loss, outputs[0] if outputs else model(**inputs)

    # Batches

    def _add_streams(
        self,
        lower_collator: Callable[[list[Any]], dict[str, Any]],
        train_transform: Transform | None,
        lower_transform: Transform | None,
    ) -> None:
        """Adds the streams of both levels. An upper batch larger than the labelled set is cut to it, with a warning.

        Raises:
            `ValueError`: for data sets that are missing, empty or smaller than a pretext batch, and for parts of one
                row with batch norm.
        """
        args, world = self.args, self.args.world_size
        self.data_collator = self.dropping_columns(self.data_collator, self.model.upper)
        lower_collator = self.dropping_columns(lower_collator, self.model.lower)
        upper_batch = labelled_batch_size(args.per_device_train_batch_size, world, self.train_dataset)
        lower_batch = args.per_device_lower_batch_size * world
        curvature_batch = args.curvature_batch_size or lower_batch
        for field, batch in (("per_device_lower_batch_size", lower_batch), ("curvature_batch_size", curvature_batch)):
            check_pretext_batch(batch, self.lower_dataset, name="lower_dataset", field=field)
        check_rows(
            self.train_dataset, name="train_dataset", transform="train_transform", labelled_for=self.model.upper
        )
        check_rows(self.lower_dataset, name="lower_dataset", transform="lower_transform")
        labelled = partial(KeyedSource, self.train_dataset, upper_batch, self.data_collator, world_size=world)
        unlabelled = partial(KeyedSource, self.lower_dataset, collator=lower_collator, world_size=world)
        lower = unlabelled(batch_size=lower_batch, steps_per_alternation=args.lower_steps)
        curvature = unlabelled(batch_size=curvature_batch, steps_per_alternation=1)
        warm_up = labelled(steps_per_alternation=len(self.train_dataset) // upper_batch)
        self.streams.add(Stream.LOWER, lower, lower_transform)
        self.streams.add(Stream.CURVATURE, curvature, lower_transform)
        self.streams.add(Stream.UPPER, labelled(steps_per_alternation=args.upper_steps), train_transform)
        self.streams.add(Stream.HEAD_WARMUP, warm_up, train_transform)
        lower_part, upper_part = args.lower_micro_batch_size, args.upper_micro_batch_size
        for level, batch, part, what in (
            (self.model.lower, lower_batch, lower_part, "per_device_lower_batch_size and lower_micro_batch_size"),
            (self.model.lower, curvature_batch, lower_part, "curvature_batch_size and lower_micro_batch_size"),
            (self.model.upper, upper_batch, upper_part, "per_device_train_batch_size and upper_micro_batch_size"),
        ):
            check_rows_for_batch_norm(level, batch // world, part, what=what)
        self.check_workers(Stream.LOWER, Stream.UPPER)

    def get_train_dataloader(self) -> AlternatingDataLoader:
        """Returns the loader of tagged batches of both levels."""
        if Stream.LOWER not in self.streams.sources:
            raise ValueError("train_dataset and lower_dataset are missing; both levels need data.")
        return self.keyed_loader((Stream.LOWER, self.args.lower_steps), (Stream.UPPER, self.args.upper_steps))

    def try_losses(self, rows: int) -> None:
        """Computes both losses on the first rows, and builds the schedules, without side effects, so that settings,
        data and models that do not fit fail before training.

        Args:
            rows (`int`): how many rows of each data set to take.
        """
        for level in ("lower", "upper"):
            self.args.level(level).build_schedule()
        batches = [self.streams.first_rows(stream, rows) for stream in (Stream.LOWER, Stream.UPPER)]
        found = self.losses.try_on(batches[0], batches[1])
        for (inputs, _), (level, loss) in zip(batches, found.items(), strict=True):
            check_first_batch(inputs, {f"{level} loss": loss})

    # A step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Leaves the gradients of one lower or one upper step on that level's parameters, as the batch's key says; the
        optimizer does the rest."""
        key: StepKey = inputs["key"]
        self.divergence.begin_step(key)
        model.train()
        self._level = Stream(key.stream).level
        batch = self.streams.prepare(inputs["inputs"], key)
        self.count_samples(batch)
        if self._level == "lower":
            self.upper_phase.leave()
            self._damping = None
            if key.step == 0:
                self._begin_alternation(key.alternation)
            with model_randomness(key):
                return self._lower_step(model, batch, key)
        with model_randomness(key):
            loss = self._upper_step(batch, key)
        if key.step == self.args.upper_steps - 1:
            self.upper_phase.leave()
        return loss

    def _lower_step(self, model: nn.Module, inputs: Inputs, key: StepKey) -> Tensor:
        """Gradient of  L_P(theta_P, phi_P) + lambda/2 ||theta_P - theta_D||^2  (section 2 of the paper)."""
        loss = torch.zeros((), device=self.args.device)
        terms = self.losses.lower_terms(self.monitor.watching(partial(model, level="lower")), inputs, key)
        for index, term in enumerate(terms):
            with self._synchronised_if(index == len(terms) - 1, model):
                part_loss = term()
                self.accelerator.backward(part_loss)
            loss = loss + part_loss.detach()

        average_flat([], in_place=running_statistics(self.model.lower))
        proximal_weight = self.proximal_weight
        # One tensor per shared parameter in all vectors over theta: offset, gradients, force.
        theta_p, theta_d = self.model.backbone_parameters("lower"), self.model.backbone_parameters("upper")
        offset = subtract([p.detach() for p in theta_p], [p.detach() for p in theta_d])
        gradients = fill_missing([p.grad for p in theta_p], [p.detach() for p in theta_p])
        if not self.upper_phase.takes_products and not (self.divergence.skips and not is_finite(gradients)):
            is_last = key.step == self.args.lower_steps - 1
            self.upper_phase.record(self.loss_scale.remove(gradients), is_last=is_last)
        force = [self.loss_scale(part) for part in offset]
        for parameter, gradient in zip(theta_p, add_scaled(gradients, force, proximal_weight), strict=True):
            parameter.grad = gradient
        self.divergence.note_loss(loss)
        self.metrics_buffer.add("loss", loss)
        self.metrics_buffer.add("lower/loss", loss)
        self.metrics_buffer.add("lower/proximal", 0.5 * proximal_weight * dot(offset, offset))
        return loss

    @contextmanager
    def _synchronised_if(self, synchronised: bool, model: nn.Module) -> Iterator[None]:
        """Averages gradients over processes in the last part of a batch only."""
        if synchronised:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def _upper_step(self, inputs: Inputs, key: StepKey) -> Tensor:
        """Hypergradient (section 2 of the paper):
        g_theta = x + gamma grad_theta L_D(theta_D, phi_D)  with  (I + H/(lambda + delta)) x = grad_theta L_D(theta_P,
        phi_D), g_phi = grad_phi L_D(theta_P, phi_D) + gamma grad_phi L_D(theta_D, phi_D).
        """
        gamma = self.args.direct_weight
        theta_p, theta_d = self.model.backbone_parameters("lower"), self.model.backbone_parameters("upper")
        phi_d = self.model.head_parameters("upper")
        # Losses have shape (); gradients are vectors over (theta, phi), still those of this process.
        aligned = self.model.without_side_effects("aligned")
        loss, at_theta_p = self.losses.upper_gradient(aligned, inputs, (*theta_p, *phi_d))
        direct_loss, at_theta_d = self.losses.upper_gradient(
            self.model.upper, inputs, (*theta_d, *phi_d), differentiate=gamma > 0
        )
        # One all-reduce for both gradients and the running statistics: n_theta + n_phi entries each.
        reduced = average_flat([*at_theta_p, *at_theta_d], in_place=running_statistics(self.model.upper))
        at_theta_p, at_theta_d = reduced[: len(at_theta_p)], reduced[len(at_theta_p) :]
        # rhs = grad_theta L_D(theta_P, phi_D), the right-hand side of the linear system
        rhs, at_phi_d = at_theta_p[: len(theta_p)], at_theta_p[len(theta_p) :]
        # (x, grad_phi L_D(theta_P, phi_D)), then gamma times the direct term
        gradient: Vector = (*self._solve(key, rhs).solution, *at_phi_d)
        if at_theta_d:
            gradient = add_scaled(gradient, at_theta_d, gamma)
        for parameter, value in zip((*theta_d, *phi_d), gradient, strict=True):
            parameter.grad = value

        self.divergence.note_loss(loss + direct_loss)
        self.metrics_buffer.add("loss", loss)
        self.metrics_buffer.add("upper/loss", loss)
        self.metrics_buffer.add("upper/direct_loss", direct_loss)
        return loss

    def _solve(self, key: StepKey, rhs: Vector) -> Solve:
        """Solves the linear system of an upper step and notes how that went. A right-hand side that overflowed in fp16
        comes back as it is, for the optimizer to skip the step."""
        if self.loss_scale.overflowed(rhs):
            return Solve(rhs)
        solve = self.upper_phase.solve(key, rhs, proximal_weight=self.proximal_weight, damping=self.damping)
        info, add = solve.info, self.metrics_buffer.add
        if solve.alignment is not None:
            add("alignment/cosine", solve.alignment)
        if solve.pretext_norm is not None:
            self.divergence.note_loss(solve.pretext_norm)  # not finite where the loss of the curvature is not
        if self.args.solver == "mfac":
            add("solver/cosine", cosine(solve.solution, rhs))
        if info is not None and self.upper_phase.takes_products:
            add("solver/iterations", info.iterations_tensor)
            add("solver/residual", info.residual_tensor)
            lowest = self._lowest_quotient.to(rhs[0].device, non_blocking=True)
            self._lowest_quotient = torch.minimum(lowest, info.rayleigh_quotient_tensor.double())
            add("solver/cosine", cosine(solve.solution, rhs))
            for position, status in enumerate(SolveStatus):
                if status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NON_FINITE):
                    add(f"solver/{status}", info.status_tensor == position)
        return solve

    @property
    def proximal_weight(self) -> float:
        """lambda of the present alternation."""
        if self.weight.value is None:
            self.weight.start(self.estimate_pull(proximal_weight=1.0))
        return float(self.weight.value or 0.0)

    @property
    def damping(self) -> float:
        """delta of the present alternation. With `damping="auto"` it follows from the pull of its lower steps, and is
        read from the device once per upper phase."""
        if self.args.damping != "auto":
            return float(self.args.damping or 0.0)
        if self._damping is None:
            self._damping = horizon_damping(self.proximal_weight, self.pull.of_alternation())
        return self._damping

    @torch.no_grad()
    def _begin_alternation(self, alternation: int) -> None:
        """Corrects lambda where the run departs from `target_pull`, and moves theta_D towards theta_P every few
        alternations (off by default): theta_D <- (1 - s) theta_D + s theta_P."""
        if alternation and self.args.target_pull is not None:
            rates = self.args.level("lower").learning_rates_by(self.args.lower_steps)
            self.weight.correct(self.pull, past_rates=rates[alternation - 1], coming_rates=sum(rates[alternation:]))
        self.pull.begin_alternation()
        every = self.args.upper_adaptation_every
        if every and alternation and alternation % every == 0:
            theta_p, theta_d = self.model.backbone_parameters("lower"), self.model.backbone_parameters("upper")
            torch._foreach_lerp_(list(theta_d), list(theta_p), self.args.upper_adaptation_strength)

    # Optimization

    def _level_parameters(self, level: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Returns theta and phi of a level."""
        if level == "lower":
            return self.model.backbone_parameters("lower"), self.model.head_parameters("lower")
        return self.model.backbone_parameters("upper"), self.model.head_parameters("upper")

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Returns one optimizer for both levels; weight decay applies to every parameter."""
        if self.optimizer is None:
            self.optimizer = self.two_level_optimizer = TwoLevelOptimizer(
                **{level: self.args.level(level).build_optimizer(*self._level_parameters(level)) for level in LEVELS}
            )
            for name in ("target_pull", "damping"):
                wanted = self.args.damping == "auto" if name == "damping" else self.args.target_pull is not None
                if wanted and not has_step_length(self.two_level_optimizer.lower):
                    raise ValueError(
                        f"{name} is {getattr(self.args, name)!r}, which needs the step length of the lower optimizer; "
                        f"it is not known for lower_optim={self.args.lower_optim!r}. Set proximal_weight and a number "
                        "for damping, or take lars, sgd, adam, adamw or nadam."
                    )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Returns the schedule that follows each level's own steps."""
        if self.lr_scheduler is None:
            self.lr_scheduler = two_level_scheduler(
                optimizer or self.create_optimizer(),
                {level: self.args.level(level).build_schedule() for level in LEVELS},
                lower_steps=self.args.lower_steps,
                upper_steps=self.args.upper_steps,
            )
            # 2026-11, transformers 5.23: Trainer saves a schedule only if it is marked as its own.
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips the gradients of the current level, the only ones that there are, to that level's bound (a private
        hook of transformers 5.23, 2026-11)."""
        bound = self.args.level(self._level).max_grad_norm
        size = self.accelerator.clip_grad_norm_(model.parameters(), bound or float("inf"))
        if self.loss_scale.is_active:
            skipped = not size.isfinite().item()
            self.metrics_buffer.add(f"{self._level}/skipped_steps", float(skipped))
            if skipped:
                return size
        if self.divergence.note_gradient(size):
            return size
        self.metrics_buffer.add(f"{self._level}/gradient_norm", size)
        if self._level == "lower":
            self.pull.count(
                self.two_level_optimizer.lower,
                self.model.backbone_parameters("lower"),
                clip_factor(size, bound),
                proximal_weight=self.proximal_weight,
            )
        return size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        """Trainer skips clipping where the upper bound is 0; the lower level may still have one (a private hook of
        transformers 5.23, 2026-11)."""
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def inputs_of_step(self, key: StepKey) -> list[Inputs]:
        """Returns the batch of a step, and of an upper one that of the curvature too."""
        inputs = super().inputs_of_step(key)
        if key.stream == Stream.UPPER:
            inputs.append(self.streams.read(self.streams.key(Stream.CURVATURE, key.alternation)))
        return inputs

    # Before the first alternation

    def remember_start(self) -> None:
        """Keeps theta_P as it is before the first alternation, for the figure of how far it has moved."""
        if self._start is None:
            self._start = tuple(p.detach().clone() for p in self.model.backbone_parameters("lower"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A resumed run starts from the weights that the trainer was given, too, and its head is warmed up (a private
        hook of transformers 5.23, 2026-11)."""
        self.remember_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._head_is_warm = True

    def warm_up_head(self, *, max_steps: int | None = None) -> None:
        """Trains phi_D alone on the frozen backbone, which stays in train mode: the upper optimizer at a constant
        learning rate, without clipping. Runs once; `train` calls it before the first alternation.

        Args:
            max_steps (`int`, *optional*): fewer steps than `head_warmup_epochs` has.
        """
        head = self.model.head_parameters("upper")
        steps = self.args.head_warmup_epochs * self.streams.sources[Stream.HEAD_WARMUP].steps_per_alternation
        steps = steps if max_steps is None else min(steps, max_steps)
        if self._head_is_warm or not steps or not head:
            return
        self._head_is_warm = True
        show = not self.args.disable_tqdm and self.is_local_process_zero()
        optimizer = self.args.level("upper").build_optimizer(head)
        warm_up_head(self.losses, self.streams, optimizer, steps=steps, show_progress=show)

    def module_under_ddp(self) -> nn.Module:
        """The lower model: gradients of the upper one are written by hand."""
        return self.model.lower

    def first_gradients(self) -> list[Tensor | None]:
        """Returns the gradients of the scaled pretext loss on the first lower batch in the lower level's parameters,
        theta_P first."""
        key = self.streams.key(Stream.LOWER)
        batch = self.streams.read(key)
        self.model.train()
        parameters = list(chain(*self._level_parameters("lower")))
        gradients: list[Tensor | None] = [None] * len(parameters)
        with model_randomness(key):
            for term in self.losses.lower_terms(self.model.without_side_effects("lower"), batch, key):
                found = torch.autograd.grad(self.loss_scale(term()), parameters, allow_unused=True)
                pairs = zip(gradients, found, strict=True)
                gradients = [b if a is None else a if b is None else a + b for a, b in pairs]
        return gradients

    def estimate_pull(self, proximal_weight: float | None = None) -> float:
        """Estimates the pull of the whole run from the gradient at the present weights on the first lower batch. NaN
        for a lower optimizer of unknown step length.

        Args:
            proximal_weight (`float`, *optional*): lambda; that of the run if not given.
        """
        self.create_optimizer()
        settings = self.args.level("lower")
        gradient = fill_missing(self.first_gradients(), list(chain(*self._level_parameters("lower"))))
        pull_at_one = estimate_pull(
            self.two_level_optimizer.lower,
            self.model.backbone_parameters("lower"),
            average_flat(self.loss_scale.remove(gradient)),
            bound=settings.max_grad_norm,
            learning_rates=settings.total_learning_rate(),
        )
        if proximal_weight is None and self.weight.value is None:
            self.weight.start(pull_at_one)
        return pull_at_one * (self.proximal_weight if proximal_weight is None else proximal_weight)

    # Evaluation, logs and what users take away

    def aligned_model(self) -> nn.Module:
        """Returns a native copy of the aligned model (theta_P with phi_D), its batch-norm statistics estimated anew on
        downstream training images."""
        model = self.model.aligned_model()
        if has_batch_norm(model) and self.train_dataset is not None and self.args.bn_recalibration_images:
            recalibrate_batch_norm(model, self.recalibration_batches())
        return model.eval()

    def recalibration_batches(self) -> Iterator[Inputs]:
        """Yields the batches for `aligned_model`, see [`~ResumableTrainer.calibration_batches`]."""
        return self.calibration_batches(self.args.bn_recalibration_images)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Runs the aligned model, and in an evaluation the upper one too, as `{prefix}_upper_*`."""
        prefix = kwargs.pop("metric_key_prefix", "eval")
        with self.evaluating(self.aligned_model()):
            output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=prefix, **kwargs)
        if description == "Evaluation" and output.metrics is not None:
            with self.evaluating(copy.deepcopy(self.model.upper).eval()):
                second = super().evaluation_loop(
                    dataloader, description, *args, metric_key_prefix=f"{prefix}_upper", **kwargs
                )
            output.metrics.update(second.metrics or {})
        return output

    def collect_logs(self) -> dict[str, float]:
        """Adds what is measured at the moment of the log."""
        theta_p = [p.detach() for p in self.model.backbone_parameters("lower")]
        size = norm(theta_p)
        # The first group of a level is that of its backbone.
        rates = {group["level"]: group["lr"] for group in reversed(self.two_level_optimizer.param_groups)}
        for name, figure in self.monitor.pop_figures().items():
            self.metrics_buffer.add(f"lower/{name}", figure)
        collected = super().collect_logs()
        if collected.get("solver/negative_curvature", 0.0) >= 0.5 and not self._has_warned:
            self._has_warned = True
            enough = sufficient_damping(
                float(self._lowest_quotient), proximal_weight=self.proximal_weight, damping=self.damping
            )
            logger.warning(
                "Half or more of the linear solves of an alternation met negative curvature and stopped early: I + H "
                f"/ (lambda + delta) is not definite. Raise damping, which is {self.damping:.4g}: {enough:.2g} would "
                "have been enough along the direction at which a solve stopped."
            )
        return {
            **collected,
            **({"levels/pull": float(self.pull.total)} if has_step_length(self.two_level_optimizer.lower) else {}),
            **({"levels/proximal_weight": self.proximal_weight} if self.args.target_pull is not None else {}),
            **({"solver/damping": self.damping} if self.args.damping == "auto" and self.upper_phase.damps else {}),
            "levels/distance": float(norm(subtract(theta_p, self.model.backbone_parameters("upper"))).detach() / size),
            "levels/moved": float(norm(subtract(theta_p, self._start or theta_p)) / size),
            "lower/learning_rate": rates["lower"],
            "upper/learning_rate": rates["upper"],
        }

    def write_final_model(self, folder: str) -> None:
        """Writes the model of `export_level` as a native checkpoint, and both levels in `bilevel/` for going on."""
        level = self.exported_level()
        batches = list(self.recalibration_batches()) if self.train_dataset is not None and level == "aligned" else []
        self.model.export(folder, processing_class=self.processing_class, recalibrate_on=batches or None, level=level)
        self.model.save_pretrained(Path(folder) / "bilevel")
        if self.processing_class is not None:
            self.processing_class.save_pretrained(Path(folder) / "bilevel")

    def exported_level(self) -> str:
        """Returns the level that `save_model` writes, `"aligned"` or `"upper"`: `export_level`, and for `"best"` the
        one that did better in the last evaluation (of the best checkpoint, if training ended by loading it); the
        aligned model if they did equally well or none has taken place.
        """
        if self.args.export_level != "best":
            return self.args.export_level
        return better_level(
            self.state.log_history,
            self.args.metric_for_best_model,
            greater_is_better=self.args.greater_is_better,
            step=self.state.best_global_step if self.args.load_best_model_at_end else None,
        )

    def record(self) -> RunRecord:
        """Returns what a card says of the run and the aligned model."""
        examples = {"train": size_of(self.train_dataset), "lower": size_of(self.lower_dataset)}
        return replace(record_run(self, "aligned", examples=examples), exported_level=self.exported_level())

    def resume_settings(self) -> dict[str, Any]:
        """Adds what each stream reads, and the other optimizer."""
        streams = self.streams.describe(Stream.LOWER, Stream.UPPER, Stream.CURVATURE)
        own = {"lower_optim": self.args.lower_optim, "class_weights": self.downstream_loss.describe()}
        return {**super().resume_settings(), **streams, **own}


class _AfterLowerStep(TrainerCallback):
    """Moves the target of a lower model that has one (BYOL) after each of its steps."""

    def __init__(self, trainer: BiSSLTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lower: Any = self.trainer.model.lower
        lower_steps, upper_steps = args.lower_steps, args.upper_steps
        if hasattr(lower, "update_target") and state.global_step % (lower_steps + upper_steps) < lower_steps:
            step = own_step(state.global_step, "lower", lower_steps=lower_steps, upper_steps=upper_steps)
            lower.update_target(step, args.num_alternations * lower_steps)


class _BeforeFirstAlternation(TrainerCallback):
    """Warms the head up and looks at the pull, once the model is where it will be trained."""

    def __init__(self, trainer: BiSSLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.remember_start()
            lower: Any = self.trainer.model.lower
            if args.restart_target and hasattr(lower, "restart_target"):
                lower.restart_target()
            self.trainer.warm_up_head()
            pull = self.trainer.estimate_pull()
            warn_about_pull(pull, self.trainer.proximal_weight)
