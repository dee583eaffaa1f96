"""The trainer of the bilevel problem: alternations of lower and upper steps as epochs of a `transformers.Trainer`."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import TrainerCallback, default_data_collator
from transformers.utils import logging
from transformers.utils.generic import find_labels

from ..data.alternation import AlternatingDataLoader, KeyedSource, StepKey, Stream, read_rows
from ..distributed import average_flat
from ..hypergradient import Curvature, implicit_gradient
from ..linear_solve import SolveStatus
from ..models.modeling_bissl import BiSSLModel
from ..tensors import Vector, add_scaled, cosine, dot, fill_missing, norm, subtract
from .keyed_trainer import Transform, split_rows
from .level_data import level_sources
from .level_evaluation import LevelEvaluation
from .optimizer import TwoLevelOptimizer, build_optimizer, clip_factor, has_step_length, step_length
from .schedule import Schedule, level_schedule, two_level_scheduler
from .training_args import BiSSLTrainingArguments

logger = logging.get_logger(__name__)

LossModel = Callable[..., Any]


class BiSSLTrainer(LevelEvaluation):
    """Solves the bilevel problem of BiSSL (arXiv 2410.02387).

    One epoch of the Trainer is one alternation: `lower_steps` steps on the pretext loss pulled towards theta_D, then
    `upper_steps` steps on the downstream loss along the hypergradient. To train another pair of tasks override
    [`~BiSSLTrainer.compute_lower_loss`] and [`~BiSSLTrainer.compute_upper_loss`].

    Args:
        model ([`BiSSLModel`]): both levels.
        args ([`BiSSLTrainingArguments`])
        train_dataset, eval_dataset: labelled, map-style data sets of the upper level.
        lower_dataset: map-style data set of the lower level.
        data_collator, lower_data_collator (`Callable`, *optional*): stack rows into a dictionary of tensors.
        train_transform, eval_transform, lower_transform (`Callable`, *optional*): `transform(inputs, key) -> inputs`,
            run on the device and deterministic in the key.
        callbacks (`list`, *optional*): as in `transformers.Trainer`.
        **trainer_kwargs: further arguments of `transformers.Trainer` (`processing_class`, `compute_metrics`, ...).

    Raises:
        `TypeError`: if `model` is not a [`BiSSLModel`].
        `ValueError`: for data sets that are missing, empty or smaller than a pretext batch.

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

    def __init__(
        self,
        model: BiSSLModel,
        args: BiSSLTrainingArguments,
        *,
        train_dataset: Any = None,
        lower_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        lower_data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        lower_transform: Transform | None = None,
        callbacks: list[TrainerCallback] | None = None,
        **trainer_kwargs: Any,
    ) -> None:
        if not isinstance(model, BiSSLModel):
            raise TypeError(
                f"model is a {type(model).__name__}; it must be a BiSSLModel (see BiSSLModel.from_models)."
            )
        if eval_dataset is None and args.eval_strategy != "no":
            logger.info("No eval_dataset was given, so nothing is evaluated during training.")
            args.eval_strategy = type(args.eval_strategy)("no")
        self.lower_dataset = lower_dataset
        self.lower_data_collator = lower_data_collator or default_data_collator
        self.train_transform, self.lower_transform = train_transform, lower_transform
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            eval_transform=eval_transform,
            callbacks=[*(callbacks or []), _BeforeFirstAlternation(self)],
            **trainer_kwargs,
        )
        if args.label_names is None:
            self.label_names = find_labels(type(model.upper))
        # Columns that the upper model takes; Trainer would look at the signature of BiSSLModel.
        self._signature_columns = [  # type: ignore[assignment]
            *inspect.signature(model.upper.forward).parameters,
            "label",
            "label_ids",
        ]
        if eval_transform is not None:
            # The transform may need columns that forward does not name.
            self.args.remove_unused_columns = False
        self.sources: dict[Stream, KeyedSource] = {}
        if train_dataset is not None or lower_dataset is not None:
            self.sources = level_sources(
                args, train_dataset, lower_dataset, self.data_collator, self.lower_data_collator
            )
        self._start: Vector | None = None
        self._pull = 0.0
        self._current_level = "lower"
        self._curvature: tuple[int, Curvature] | None = None
        self._head_is_warm = False

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

    # Batches

    def get_train_dataloader(self) -> AlternatingDataLoader:
        """Returns the loader of tagged batches of both levels."""
        if not self.sources:
            raise ValueError("train_dataset and lower_dataset are missing; both levels need data.")
        phases = [(Stream.LOWER, self.args.lower_steps), (Stream.UPPER, self.args.upper_steps)]
        return self.keyed_loader(self.sources, phases)

    # Optimization

    def _level_parameters(self, level: str) -> tuple[Tensor, ...]:
        if level == "lower":
            return (*self.model.lower_shared_parameters(), *self.model.lower_head_parameters())
        return (*self.model.upper_shared_parameters(), *self.model.upper_head_parameters())

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Returns one optimizer for both levels; weight decay applies to every parameter."""
        if self.optimizer is None:
            lower = build_optimizer(
                self.args.lower_optim,
                self._level_parameters("lower"),
                learning_rate=self.args.lower_learning_rate,
                weight_decay=self.args.lower_weight_decay,
                options=self.args.lower_optimizer_options,
                field="lower_optim",
            )
            upper = self._build_upper_optimizer(self._level_parameters("upper"))
            self.optimizer = self.two_level_optimizer = TwoLevelOptimizer(upper=upper, lower=lower)
        return self.optimizer

    def _build_upper_optimizer(self, parameters: tuple[Tensor, ...]) -> Optimizer:
        return build_optimizer(
            self.args.optim,
            parameters,
            learning_rate=self.args.learning_rate,
            weight_decay=self.args.weight_decay,
            options=self.args.optimizer_options,
            field="optim",
        )

    def level_schedules(self) -> dict[str, Schedule]:
        """Returns the learning-rate factor of each level as a function of its own step."""
        args = self.args
        lower_total, upper_total = args.num_alternations * args.lower_steps, args.num_alternations * args.upper_steps
        return {
            "lower": level_schedule(
                args.lower_lr_scheduler_type,
                num_steps=lower_total,
                learning_rate=args.lower_learning_rate,
                warmup_steps=args.get_lower_warmup_steps(),
                options=args.lower_lr_scheduler_kwargs,
                field="lower_lr_scheduler_type",
            ),
            "upper": level_schedule(
                args.lr_scheduler_type,
                num_steps=upper_total,
                learning_rate=args.learning_rate,
                warmup_steps=args.get_warmup_steps(upper_total),
                options=args.lr_scheduler_kwargs,
                field="lr_scheduler_type",
            ),
        }

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Returns the schedule that follows each level's own steps."""
        if self.lr_scheduler is None:
            self.lr_scheduler = two_level_scheduler(
                optimizer or self.create_optimizer(),
                self.level_schedules(),
                lower_steps=self.args.lower_steps,
                upper_steps=self.args.upper_steps,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clips the gradients of the current level, the only ones that there are, to that level's bound."""
        bound = self.args.lower_max_grad_norm if self._current_level == "lower" else self.args.max_grad_norm
        size = self.accelerator.clip_grad_norm_(model.parameters(), bound or float("inf"))
        self.metrics_buffer.add(f"{self._current_level}/gradient_norm", size)
        if self._current_level == "lower":
            self._count_pull(clip_factor(size, bound))
        return size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        """Trainer skips clipping where the upper bound is 0; the lower level may still have one."""
        return super()._get_grad_norm(model, self._clip_grad_norm(model) if grad_norm is None else grad_norm)

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
            self._curvature = None
            if key.step == 0:
                self._adapt_upper(key.alternation)
            with self.model_randomness(key):
                return self._lower_step(model, batch)
        curvature = self._curvature_of(key)
        with self.model_randomness(key):
            return self._upper_step(curvature, batch)

    def _lower_step(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Gradient of  L_P(theta_P, phi_P) + lambda/2 ||theta_P - theta_D||^2  (section 2 of the paper)."""
        loss = torch.zeros((), device=self.args.device)
        parts = split_rows(inputs, self.args.lower_micro_batch_size)
        for index, (part, share) in enumerate(parts):
            synchronised = index == len(parts) - 1
            with self._synchronised_if(synchronised, model), self.accelerator.autocast():
                part_loss = self.compute_lower_loss(partial(model, level="lower"), part) * share
                self.accelerator.backward(part_loss)
            loss = loss + part_loss.detach()

        theta_p, theta_d = self.model.lower_shared_parameters(), self.model.upper_shared_parameters()
        pull = subtract([p.detach() for p in theta_p], [p.detach() for p in theta_d])
        gradients = fill_missing([p.grad for p in theta_p], [p.detach() for p in theta_p])
        for parameter, gradient in zip(theta_p, add_scaled(gradients, pull, self.args.proximal_weight), strict=True):
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

    def _curvature_of(self, key: StepKey) -> Curvature:
        """Returns H of this alternation, linearised at its first upper step that is executed (after a resume, any)."""
        if self._curvature is None or self._curvature[0] != key.alternation:
            batch_key = key._replace(level=int(Stream.CURVATURE), step=0)
            inputs = self.move_and_transform(
                self.sources[Stream.CURVATURE].read(batch_key), batch_key, self.lower_transform
            )
            parts = split_rows(inputs, self.args.lower_micro_batch_size)

            def lower_loss() -> Tensor:
                with self.accelerator.autocast():
                    losses = [share * self.compute_lower_loss(self.model.pure("lower"), part) for part, share in parts]
                return torch.stack(losses).sum()

            with self.model_randomness(batch_key):
                curvature = Curvature(
                    lower_loss,
                    self.model.lower_shared_parameters(),
                    mode=self.args.curvature_mode,
                    reduce=average_flat,
                )
            self._curvature = (key.alternation, curvature)
        return self._curvature[1]

    def _upper_step(self, curvature: Curvature, inputs: dict[str, Any]) -> Tensor:
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
        reduced = average_flat([*at_theta_p, *at_theta_d])
        at_theta_p, at_theta_d = reduced[: len(at_theta_p)], reduced[len(at_theta_p) :]
        rhs = at_theta_p[: len(theta_p)]
        solution, info = implicit_gradient(
            curvature,
            rhs,
            proximal_weight=args.proximal_weight,
            damping=args.damping,
            max_iterations=args.solver_max_iterations,
            tolerance=args.solver_tolerance,
            solver=args.solver,
        )
        gradient: Vector = (*solution, *at_theta_p[len(theta_p) :])
        if at_theta_d:
            gradient = add_scaled(gradient, at_theta_d, args.direct_weight)
        for parameter, value in zip((*theta_d, *phi_d), gradient, strict=True):
            parameter.grad = value

        self.metrics_buffer.add("loss", loss)
        self.metrics_buffer.add("upper/loss", loss)
        self.metrics_buffer.add("upper/direct_loss", direct_loss)
        self.metrics_buffer.add("alignment/cosine", cosine(curvature.gradient, rhs))
        if args.solver != "identity":
            self.metrics_buffer.add("solver/iterations", info.iterations_tensor)
            self.metrics_buffer.add("solver/residual", info.residual_tensor)
            for position, status in enumerate(SolveStatus):
                if status in (SolveStatus.NEGATIVE_CURVATURE, SolveStatus.NON_FINITE):
                    self.metrics_buffer.add(f"solver/{status}", info.status_tensor == position)
        return loss

    def _upper_gradient(
        self, model: LossModel, inputs: dict[str, Any], parameters: tuple[Tensor, ...], *, differentiate: bool = True
    ) -> tuple[Tensor, Vector]:
        """Returns the upper loss of a model and its gradient; no gradient (an empty vector) if not asked for. The
        gradient is linear in the rows, so parts of a batch add up to it exactly."""
        total = torch.zeros((), device=self.args.device)
        gradient: Vector = ()
        for part, share in split_rows(inputs, self.args.upper_micro_batch_size):
            with torch.set_grad_enabled(differentiate), self.accelerator.autocast():
                loss = self.compute_upper_loss(model, part) * share
            total = total + loss.detach()
            if differentiate:
                found = fill_missing(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
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

    # Before the first alternation

    def remember_start(self) -> None:
        """Keeps theta_P as it is before the first alternation, for the figure of how far it has moved."""
        if self._start is None:
            self._start = tuple(p.detach().clone() for p in self.model.lower_shared_parameters())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A resumed run starts from the weights that the trainer was given, too."""
        self.remember_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def warm_up_head(self) -> None:
        """Trains phi_D alone on the frozen backbone, which stays in train mode: the upper optimizer at a constant
        learning rate, without clipping. Runs once; `train` calls it before the first alternation."""
        if self._head_is_warm:
            return
        self._head_is_warm = True
        head = self.model.upper_head_parameters()
        source = self.sources[Stream.HEAD_WARMUP]
        steps = self.args.head_warmup_epochs * source.steps_per_alternation
        if not steps or not head:
            return
        optimizer = self._build_upper_optimizer(head)
        self.model.train()
        hide = self.args.disable_tqdm or not self.is_local_process_zero()
        with self._frozen(self.model.upper_shared_parameters()):
            for position in tqdm(range(steps), desc="Head warm-up", disable=hide):
                epoch, step = divmod(position, source.steps_per_alternation)
                key = StepKey(self.args.key_seed, int(Stream.HEAD_WARMUP), epoch, step, self.args.process_index)
                batch = self.move_and_transform(source.read(key), key, self.train_transform)
                with self.model_randomness(key):
                    _, gradient = self._upper_gradient(self.model.upper, batch, head)
                for parameter, value in zip(head, average_flat(gradient), strict=True):
                    parameter.grad = value
                optimizer.step()
                optimizer.zero_grad()

    @contextmanager
    def _frozen(self, parameters: tuple[Tensor, ...]) -> Iterator[None]:
        for parameter in parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(True)

    # The pull of the lower level towards theta_D

    @torch.no_grad()
    def _count_pull(self, clipped: Tensor) -> None:
        """Adds this step's (effective step length) x lambda. The gradients, the proximal force among them, have been
        scaled by the factor `clipped`."""
        optimizer = self.two_level_optimizer.lower
        if not has_step_length(optimizer):
            return
        theta_p = self.model.lower_shared_parameters()
        length = step_length(optimizer, theta_p, fill_missing([p.grad for p in theta_p], theta_p))
        self._pull = self._pull + optimizer.param_groups[0]["lr"] * self.args.proximal_weight * length * clipped

    def estimate_pull(self) -> float:
        """Estimates the pull of the whole run, the sum over lower steps of (effective step length) x lambda, from the
        gradient at the present weights on the first lower batch. NaN for a lower optimizer of unknown step length."""
        self.create_optimizer()
        optimizer = self.two_level_optimizer.lower
        if not has_step_length(optimizer):
            return float("nan")
        key = StepKey(self.args.key_seed, int(Stream.LOWER), 0, 0, self.args.process_index)
        batch = self.move_and_transform(self.sources[Stream.LOWER].read(key), key, self.lower_transform)
        theta_p, phi_p = self.model.lower_shared_parameters(), self.model.lower_head_parameters()
        self.model.train()
        with self.model_randomness(key), self.accelerator.autocast():
            loss = self.compute_lower_loss(self.model.pure("lower"), batch)
        gradient = fill_missing(torch.autograd.grad(loss, (*theta_p, *phi_p), allow_unused=True), (*theta_p, *phi_p))
        gradient = average_flat([g.detach() for g in gradient])
        clipped = clip_factor(norm(gradient), self.args.lower_max_grad_norm)
        lower_steps = self.args.num_alternations * self.args.lower_steps
        schedule = self.level_schedules()["lower"]
        length = step_length(optimizer, theta_p, [clipped * g for g in gradient[: len(theta_p)]]) * clipped
        rates = self.args.lower_learning_rate * sum(schedule(step) for step in range(lower_steps))
        return float(length) * rates * self.args.proximal_weight

    def warn_about_pull(self) -> None:
        """Warns if the upper level will hardly reach the lower one."""
        pull = self.estimate_pull()
        logger.info(f"Estimated pull of the whole run: {pull:.3g}.")
        if pull < 0.5:
            logger.warning(
                "The lower level will hardly feel the upper one: the pull of the whole run is estimated at "
                f"{pull:.2g}, below 0.5. proximal_weight={2 * self.args.proximal_weight / max(pull, 1e-30):.2g} would "
                "give about 2."
            )

    # Logs and state

    def collect_logs(self) -> dict[str, float]:
        """Adds what is measured at the moment of the log."""
        theta_p = [p.detach() for p in self.model.lower_shared_parameters()]
        size = norm(theta_p)
        rates = {group["level"]: group["lr"] for group in self.two_level_optimizer.param_groups}
        collected = super().collect_logs()
        if collected.get("solver/negative_curvature", 0.0) >= 0.5:
            logger.warning_once(
                "Half or more of the linear solves of an alternation met negative curvature and stopped early: I + H "
                f"/ (lambda + delta) is not definite. Raise damping, which is {self.args.damping}."
            )
        return {
            **collected,
            **({"levels/pull": float(self._pull)} if has_step_length(self.two_level_optimizer.lower) else {}),
            "levels/distance": float(norm(subtract(theta_p, self.model.upper_shared_parameters())).detach() / size),
            "levels/moved": float(norm(subtract(theta_p, self._start or theta_p)) / size),
            "lower/learning_rate": rates["lower"],
            "upper/learning_rate": rates["upper"],
        }

    def run_state(self) -> dict[str, Any]:
        """Adds the pull so far."""
        return {**super().run_state(), "pull": float(self._pull)}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """A resumed run has its head warmed up and some pull behind it."""
        super().load_run_state(state)
        self._pull = state["pull"]
        self._head_is_warm = True

    def resume_settings(self) -> dict[str, Any]:
        """Adds what each stream reads, and the other optimizer."""
        streams = (Stream.LOWER, Stream.UPPER, Stream.CURVATURE)
        return {
            **super().resume_settings(),
            **{stream.name.lower(): self.sources[stream].describe() for stream in streams},
            "lower_optim": self.args.lower_optim,
        }


class _BeforeFirstAlternation(TrainerCallback):
    """Warms the head up and looks at the pull, once the model is where it will be trained."""

    def __init__(self, trainer: BiSSLTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.remember_start()
            self.trainer.warm_up_head()
            self.trainer.warn_about_pull()
