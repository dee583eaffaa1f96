"""The trainer of the bilevel problem: alternations of lower and upper steps as epochs of a `transformers.Trainer`."""

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm
from transformers import TrainerCallback, default_data_collator
from transformers.utils import logging
from transformers.utils.generic import find_labels

from ..bilevel.recycling import Directions
from ..cards.record import RunRecord
from ..data.alternation import AlternatingDataLoader, KeyedSource, StepKey, Stream
from ..data.streams import level_sources
from ..distributed import average_flat
from ..models.batch_norm import running_statistics
from ..models.modeling_bissl import BiSSLModel
from ..optim.optimizers import build_optimizer
from ..optim.pull import Pull, clip_factor, has_step_length, warn_about_pull
from ..optim.schedule import Schedule, level_schedule
from ..optim.two_level import TwoLevelOptimizer, two_level_scheduler
from ..tensors import Vector, fill_missing, norm, subtract
from .level_steps import LevelSteps
from .resumable_trainer import Transform
from .run_record import record_run, size_of
from .training_args import BiSSLTrainingArguments

logger = logging.get_logger(__name__)


class BiSSLTrainer(LevelSteps):
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
        `ValueError`: for data sets that are missing, empty or smaller than a pretext batch, or a lower model that does
            not fit `lower_gradient_cache`.

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
        self.check_gradient_cache()
        self._start: Vector | None = None
        self.pull = Pull(args.proximal_weight)
        self._head_is_warm = False

    # What users take away

    def write_model(self, folder: str | os.PathLike[str]) -> None:
        """Writes the aligned model as a native checkpoint, and both levels in `bilevel/` for going on."""
        batches = list(self.recalibration_batches()) if self.sources else []
        self.model.export(folder, processing_class=self.processing_class, recalibrate_on=batches or None)
        self.model.save_pretrained(Path(folder) / "bilevel")

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
        if self.loss_scale.is_active:
            skipped = not size.isfinite().item()
            self.metrics_buffer.add(f"{self._current_level}/skipped_steps", float(skipped))
            if skipped:
                return size
        self.metrics_buffer.add(f"{self._current_level}/gradient_norm", size)
        if self._current_level == "lower":
            optimizer, theta_p = self.two_level_optimizer.lower, self.model.lower_shared_parameters()
            self.pull.count(optimizer, theta_p, clip_factor(size, bound))
        return size

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        """Trainer skips clipping where the upper bound is 0; the lower level may still have one."""
        return super()._get_grad_norm(model, self._clip_grad_norm(model) if grad_norm is None else grad_norm)

    # Before the first alternation

    def remember_start(self) -> None:
        """Keeps theta_P as it is before the first alternation, for the figure of how far it has moved."""
        if self._start is None:
            self._start = tuple(p.detach().clone() for p in self.model.lower_shared_parameters())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """A resumed run starts from the weights that the trainer was given, too."""
        self.remember_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def warm_up_head(self, *, max_steps: int | None = None) -> None:
        """Trains phi_D alone on the frozen backbone, which stays in train mode: the upper optimizer at a constant
        learning rate, without clipping. Runs once; `train` calls it before the first alternation.

        Args:
            max_steps (`int`, *optional*): fewer steps than `head_warmup_epochs` has.
        """
        if self._head_is_warm:
            return
        self._head_is_warm = True
        head = self.model.upper_head_parameters()
        source = self.sources[Stream.HEAD_WARMUP]
        steps = self.args.head_warmup_epochs * source.steps_per_alternation
        steps = steps if max_steps is None else min(steps, max_steps)
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
                gradient = average_flat(gradient, in_place=running_statistics(self.model.upper))
                for parameter, value in zip(head, gradient, strict=True):
                    parameter.grad = value
                self.loss_scale.step(optimizer)
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

    def module_under_ddp(self) -> nn.Module:
        """The lower model: gradients of the upper one are written by hand."""
        return self.model.lower

    def first_gradients(self) -> list[Tensor | None]:
        """Returns the gradients of the scaled pretext loss on the first lower batch in the lower level's parameters,
        theta_P first."""
        key = StepKey(self.args.key_seed, int(Stream.LOWER), 0, 0, self.args.process_index)
        batch = self.move_and_transform(self.sources[Stream.LOWER].read(key), key, self.lower_transform)
        self.model.train()
        parameters = self._level_parameters("lower")
        gradients: list[Tensor | None] = [None] * len(parameters)
        with self.model_randomness(key):
            for term in self.lower_loss_terms(self.model.without_side_effects("lower"), batch, key):
                found = torch.autograd.grad(self.loss_scale(term()), parameters, allow_unused=True)
                pairs = zip(gradients, found, strict=True)
                gradients = [b if a is None else a if b is None else a + b for a, b in pairs]
        return gradients

    def estimate_pull(self) -> float:
        """Estimates the pull of the whole run from the gradient at the present weights on the first lower batch. NaN
        for a lower optimizer of unknown step length."""
        self.create_optimizer()
        gradient = fill_missing(self.first_gradients(), self._level_parameters("lower"))
        schedule, steps = self.level_schedules()["lower"], self.args.num_alternations * self.args.lower_steps
        return self.pull.estimate(
            self.two_level_optimizer.lower,
            self.model.lower_shared_parameters(),
            average_flat(self.loss_scale.remove(gradient)),
            bound=self.args.lower_max_grad_norm,
            learning_rates=self.args.lower_learning_rate * sum(schedule(step) for step in range(steps)),
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
            **({"levels/pull": float(self.pull.total)} if has_step_length(self.two_level_optimizer.lower) else {}),
            "levels/distance": float(norm(subtract(theta_p, self.model.upper_shared_parameters())).detach() / size),
            "levels/moved": float(norm(subtract(theta_p, self._start or theta_p)) / size),
            "lower/learning_rate": rates["lower"],
            "upper/learning_rate": rates["upper"],
        }

    def record(self) -> RunRecord:
        """Returns what a card says of the run and the aligned model."""
        return record_run(
            self, "aligned", examples={"train": size_of(self.train_dataset), "lower": size_of(self.lower_dataset)}
        )

    def run_state(self) -> dict[str, Any]:
        """Adds the pull so far, and how the curvature fits the device."""
        return {
            **super().run_state(),
            "pull": float(self.pull.total),
            "curvature_halvings": self.curvature_halvings,
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """A resumed run has its head warmed up and some pull behind it."""
        super().load_run_state(state)
        self.pull.total = torch.tensor(state["pull"], dtype=torch.float64)
        self.curvature_halvings = state["curvature_halvings"] if self.args.curvature_mode == "auto" else 0
        self._head_is_warm = True

    def run_tensors(self) -> dict[str, Tensor]:
        """Adds what the solver has learned in the upper phase that a checkpoint falls into."""
        if self._directions is None or not len(self._directions[1]):
            return super().run_tensors()
        alternation, directions = self._directions
        return {**super().run_tensors(), "alternation": torch.tensor(alternation), **directions.state_dict()}

    def load_run_tensors(self, tensors: dict[str, Tensor]) -> None:
        """A resumed upper phase goes on with what the solver had learned."""
        super().load_run_tensors(tensors)
        directions = Directions()
        directions.load_state_dict(tensors)
        self._directions = (int(tensors["alternation"]), directions)

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
            warn_about_pull(self.trainer.estimate_pull(), args.proximal_weight)
