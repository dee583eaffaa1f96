"""Arguments of the trainers: those of `transformers.TrainingArguments` with the paper's values, and the lower
level's."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from ..bilevel.curvature import CURVATURE_MODES as FIXED_CURVATURE_MODES
from ..bilevel.hypergradient import SOLVERS
from ..bilevel.upper_phase import SolveSettings
from ..models.modeling_bissl import EXPORT_LEVELS
from ..optim.optimizers import parse_optimizer_options, takes_momentum
from ..optim.pull import TYPICAL_PULL
from ..optim.two_level import LevelSettings
from .fields import (
    REFUSED,
    REFUSED_BY_ALTERNATIONS,
    REFUSED_IN_JOINT_TRAINING,
    REFUSED_IN_PRETRAINING,
)
from .resumable_args import ResumableTrainingArguments, check_at_least, checked_options

PAPER_DAMPING = 10.0
CURVATURE_KINDS = ("hessian", "gauss_newton")
CURVATURE_MODES = ("auto", *FIXED_CURVATURE_MODES)

# Smallest values allowed.
_BISSL_AT_LEAST = {
    **dict.fromkeys(("num_alternations", "lower_steps", "upper_steps", "solver_max_iterations", "solver_memory"), 1),
    **dict.fromkeys(("per_device_lower_batch_size", "curvature_batch_size"), 1),
    **dict.fromkeys(("lower_micro_batch_size", "upper_micro_batch_size"), 1),
    **dict.fromkeys(("direct_weight", "solver_tolerance", "lower_weight_decay"), 0),
    **dict.fromkeys(("head_warmup_epochs", "bn_recalibration_images", "upper_adaptation_every"), 0),
    **dict.fromkeys(("lower_warmup_steps", "lower_max_grad_norm"), 0),
}


@dataclass
class PretextTrainingArguments(ResumableTrainingArguments):
    """Arguments of self-supervised pre-training, with the paper's values (section 4) as defaults."""

    refused_fields: ClassVar[dict[str, str]] = {**REFUSED, **REFUSED_IN_PRETRAINING}

    learning_rate: float = field(default=4.8, metadata={"help": "Learning rate, not scaled by the batch."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay, on all parameters."})
    optim: str = field(default="lars", metadata={"help": "Optimizer: lars or one of torch.optim by name."})
    num_train_epochs: float = field(default=600.0, metadata={"help": "Passes over the images."})
    warmup_steps: float = field(
        default=10 / 600, metadata={"help": "Warm-up steps; below 1 a fraction of all, here 10 of 600 epochs."}
    )
    per_device_train_batch_size: int = field(default=1024, metadata={"help": "Pairs of views per device and step."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Bound on the gradient norm; 0 for none."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the pretext head or decoder; learning_rate if not given."}
    )

    def __post_init__(self) -> None:
        check_at_least(self, head_learning_rate=0)
        super().__post_init__()

    def level(self, name: str = "upper", *, num_steps: int) -> LevelSettings:
        """Returns how the model is optimized, see [`ResumableTrainingArguments.level`]."""
        return replace(super().level(name, num_steps=num_steps), head_learning_rate=self.head_learning_rate)


@dataclass
class JointTrainingArguments(PretextTrainingArguments):
    """Arguments of joint training: those of pre-training, and what the labelled examples add."""

    refused_fields: ClassVar[dict[str, str]] = {
        **PretextTrainingArguments.refused_fields,
        **REFUSED_IN_JOINT_TRAINING,
    }

    downstream_weight: float = field(default=1.0, metadata={"help": "Weight of the downstream loss."})
    per_device_labelled_batch_size: int = field(
        default=256, metadata={"help": "Labelled images per device and step, beside the pairs of views."}
    )
    bn_recalibration_images: int = field(
        default=1024, metadata={"help": "Labelled images for the batch-norm statistics of the model; 0 for none."}
    )

    def __post_init__(self) -> None:
        check_at_least(self, downstream_weight=0, per_device_labelled_batch_size=1, bn_recalibration_images=0)
        super().__post_init__()


BATCH_NORM_TREATMENTS = ("running", "recalibrated")


@dataclass
class FineTuningArguments(ResumableTrainingArguments):
    """Arguments of supervised fine-tuning, with the paper's values (section 4) as defaults. The paper searches for the
    learning rate and the weight decay; the defaults are in the middle of its ranges.

    Batch-norm statistics get the same treatment whatever the model starts from: they are estimated on training images
    before the first step, and what they are in the end depends on the fine-tuning alone; unless
    `bn_recalibration_images` is 0.
    """

    learning_rate: float = field(default=0.01, metadata={"help": "Learning rate; 1e-4 to 1 is the range to search."})
    weight_decay: float = field(default=3e-4, metadata={"help": "Weight decay, on all parameters; 1e-5 to 1e-2."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule, by name."})
    num_train_epochs: float = field(default=400.0, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Images per device and step."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Bound on the gradient norm; 0 for none."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})
    batch_norm: str = field(
        default="running",
        metadata={
            "help": "Batch-norm statistics of the final model: running (collected in training) or recalibrated "
            "(estimated anew on training images)."
        },
    )
    bn_recalibration_images: int = field(
        default=1024,
        metadata={
            "help": "Training images for batch-norm statistics estimated anew; 0 to start with those that the model "
            "comes with."
        },
    )

    def __post_init__(self) -> None:
        if self.batch_norm not in BATCH_NORM_TREATMENTS:
            allowed = ", ".join(BATCH_NORM_TREATMENTS)
            raise ValueError(f"batch_norm is {self.batch_norm!r}; it must be one of {allowed}.")
        check_at_least(self, bn_recalibration_images=int(self.batch_norm == "recalibrated"))
        super().__post_init__()


@dataclass
class BiSSLTrainingArguments(ResumableTrainingArguments):
    """Arguments of [`BiSSLTrainer`]. Fields of `transformers.TrainingArguments` govern the upper level; the defaults
    are the paper's (arXiv 2410.02387v2, section 4 and appendix). One epoch of the Trainer is one alternation.

    Args:
        num_alternations (`int`, *optional*, defaults to 500): T.
        lower_steps (`int`, *optional*, defaults to 20): N_L, lower steps per alternation.
        upper_steps (`int`, *optional*, defaults to 8): N_U, upper steps per alternation.
        target_pull (`float`, *optional*, defaults to 10 unless `proximal_weight` is given): the pull of theta_P
            towards theta_D over the whole run, for which lambda is found before the first alternation and corrected
            between alternations. Below 1 theta_P hardly feels theta_D.
        proximal_weight (`float`, *optional*): lambda itself (the paper's 0.001), in place of `target_pull`.
        damping (`float` or `"auto"`, *optional*): delta, added to lambda in the linear solve only; `"auto"` is the
            horizon of the lower steps of an alternation (see [`~optim.pull.horizon_damping`]). Defaults to `"auto"`
            with `target_pull`, and to the paper's 10 with `proximal_weight`.
        direct_weight (`float`, *optional*, defaults to 0.01): gamma, weight of the upper loss at theta_D itself.
        solver (`str`, *optional*, defaults to `"cg"`): `"cg"`, `"recycled"` or `"blockwise_cg"`, which take products
            with the curvature; `"mfac"`, `"identity"` (x = rhs) or `"none"` (x = 0), which build no second-order
            graph.
        solver_memory (`int`, *optional*, defaults to 20): pretext gradients that `"mfac"` keeps.
        solver_per_tensor (`bool`, *optional*, defaults to `False`): whether `"mfac"` solves a system of its own for
            each tensor.
        solver_max_iterations (`int`, *optional*, defaults to 5): Hessian-vector products per upper step, at most.
        solver_tolerance (`float`, *optional*, defaults to 0.0): bound on the relative residual at which a solve stops.
        curvature_kind (`str`, *optional*, defaults to `"hessian"`): `"hessian"`, the paper's; or `"gauss_newton"`,
            which is never indefinite and holds the memory of a first-order graph, for lower losses that are known as
            convex functions of outputs (see [`convex_outputs`]).
        curvature_mode (`str`, *optional*, defaults to `"auto"`): `"cached"` keeps the graph of the lower gradient for
            an upper phase; `"recompute"` builds it for each product, slower, and holds none in between; `"auto"` keeps
            it while it fits the memory of the GPU, and otherwise, with a warning, takes the curvature batch in parts.
            On a CPU it is `"cached"`.
        curvature_batch_size (`int`, *optional*): global batch that fixes H; the lower batch if not given.
        head_warmup_epochs (`int`, *optional*, defaults to 20): passes over the labelled data that train the head
            alone.
        bn_recalibration_images (`int`, *optional*, defaults to 1024): training images for the batch-norm statistics of
            the aligned model in evaluation and export; 0 keeps the pretext statistics.
        export_level (`str`, *optional*, defaults to `"aligned"`): which model `save_model`, pushes and fine-tuning
            take: `"aligned"`, theta_P with phi_D, the paper's; `"upper"`, theta_D with phi_D; or `"best"`, that of the
            two which did better in the last evaluation, by `metric_for_best_model` or else by accuracy or the loss.
        upper_adaptation_every (`int`, *optional*, defaults to 0): after each such number of alternations
            theta_D <- (1 - s) theta_D + s theta_P; 0 for never.
        upper_adaptation_strength (`float`, *optional*, defaults to 0.1): s.
        lower_learning_rate (`float`, *optional*, defaults to 1.0)
        lower_head_learning_rate (`float`, *optional*): of phi_P, such as the decoder of a masked autoencoder;
            `lower_learning_rate` if not given.
        restart_target (`bool`, *optional*, defaults to `False`): whether the moving target of a lower model that has
            one (BYOL) starts as a copy of the online network, or goes on as it is.
        lower_optim (`str`, *optional*, defaults to `"lars"`): `"lars"` or an optimizer of `torch.optim` by name.
        lower_optim_args (`str`, *optional*): its further arguments, such as `"exclude_bias_and_norm=True"`.
        lower_weight_decay (`float`, *optional*, defaults to 1e-6)
        lower_momentum (`float`, *optional*, defaults to 0.9): for optimizers that have one.
        lower_warmup_steps (`float`, *optional*, defaults to 0.1): steps, or below 1 the fraction of all lower steps.
        lower_lr_scheduler_type (`str`, *optional*, defaults to `"cosine_with_min_lr"`)
        lower_lr_scheduler_kwargs (`dict`, *optional*): its arguments; a cosine ends at a thousandth if not given.
        per_device_lower_batch_size (`int`, *optional*, defaults to 1024)
        lower_micro_batch_size (`int`, *optional*): split a lower batch into parts of this size. A contrastive loss
            then takes its negatives from the part, unless `lower_gradient_cache` is on.
        lower_gradient_cache (`bool`, *optional*, defaults to `False`): the parts of a lower batch give the loss, the
            gradient and the curvature of the whole batch, at the price of one more forward pass per step and of one
            more forward and backward pass per product. The lower model must have `loss_from_embeddings` (see
            [`SimCLRForPreTraining`]).
        upper_micro_batch_size (`int`, *optional*): likewise for an upper batch; there is still one solve per step.
        lower_max_grad_norm (`float`, *optional*, defaults to 10.0): bound on the lower gradient norm; 0 for none.

    Raises:
        `ValueError`: for a value out of range, or a field of the base class that does not apply here.
    """

    num_alternations: int = field(default=500, metadata={"help": "Alternations of lower and upper phases (T)."})
    lower_steps: int = field(default=20, metadata={"help": "Lower steps per alternation (N_L)."})
    upper_steps: int = field(default=8, metadata={"help": "Upper steps per alternation (N_U)."})
    target_pull: float | None = field(
        default=None, metadata={"help": "Pull of the run, from which lambda is found; 10 without proximal_weight."}
    )
    proximal_weight: float | None = field(
        default=None, metadata={"help": "Pull of theta_P towards theta_D in a step (lambda), in place of target_pull."}
    )
    damping: float | str | None = field(
        default=None,
        metadata={"help": "Added to lambda in the linear solve only (delta): a number, or auto (with target_pull)."},
    )
    direct_weight: float = field(default=0.01, metadata={"help": "Weight of the upper loss at theta_D (gamma)."})
    solver: str = field(default="cg", metadata={"help": f"Linear solver: {', '.join(SOLVERS)}."})
    solver_memory: int = field(default=20, metadata={"help": "Pretext gradients that solver mfac keeps."})
    solver_per_tensor: bool = field(default=False, metadata={"help": "Solver mfac: a system for each tensor."})
    solver_max_iterations: int = field(default=5, metadata={"help": "Hessian-vector products per upper step at most."})
    solver_tolerance: float = field(default=0.0, metadata={"help": "Relative residual at which a solve stops."})
    curvature_kind: str = field(
        default="hessian", metadata={"help": f"Matrix of the linear systems: {', '.join(CURVATURE_KINDS)}."}
    )
    curvature_mode: str = field(
        default="auto",
        metadata={"help": f"Graph of the curvature: {', '.join(CURVATURE_MODES)} (cached while it fits the GPU)."},
    )
    curvature_batch_size: int | None = field(
        default=None, metadata={"help": "Global batch that fixes H; the lower batch if not given."}
    )
    head_warmup_epochs: int = field(default=20, metadata={"help": "Passes that train the head on a frozen backbone."})
    bn_recalibration_images: int = field(
        default=1024, metadata={"help": "Training images for the aligned model's batch-norm statistics; 0 for none."}
    )
    export_level: str = field(
        default="aligned", metadata={"help": "Model to save: aligned (the paper's), upper, or best on validation."}
    )
    upper_adaptation_every: int = field(
        default=0, metadata={"help": "Alternations between moves of theta_D towards theta_P; 0 for none."}
    )
    upper_adaptation_strength: float = field(default=0.1, metadata={"help": "How far theta_D moves towards theta_P."})

    lower_learning_rate: float = field(default=1.0, metadata={"help": "Learning rate of the lower level."})
    lower_head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the pretext head or decoder; lower_learning_rate if none."},
    )
    restart_target: bool = field(
        default=False, metadata={"help": "BYOL: copy the target anew from the online network before BiSSL."}
    )
    lower_optim: str = field(default="lars", metadata={"help": "Lower optimizer: lars or one of torch.optim."})
    lower_optim_args: str | None = field(default=None, metadata={"help": "Its further arguments: name=value,..."})
    lower_weight_decay: float = field(default=1e-6, metadata={"help": "Weight decay of the lower level."})
    lower_momentum: float = field(default=0.9, metadata={"help": "Momentum of the lower level."})
    lower_warmup_steps: float = field(default=0.1, metadata={"help": "Warm-up steps; below 1 a fraction of all."})
    lower_lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Lower schedule, by name."})
    lower_lr_scheduler_kwargs: dict | str | None = field(default=None, metadata={"help": "Its arguments, as JSON."})
    per_device_lower_batch_size: int = field(default=1024, metadata={"help": "Lower batch per device."})
    lower_micro_batch_size: int | None = field(default=None, metadata={"help": "Split lower batches into such parts."})
    lower_gradient_cache: bool = field(
        default=False, metadata={"help": "The parts of a lower batch give the loss of the whole batch."}
    )
    upper_micro_batch_size: int | None = field(default=None, metadata={"help": "Split upper batches into such parts."})
    lower_max_grad_norm: float = field(default=10.0, metadata={"help": "Bound on the lower gradient norm; 0: none."})

    learning_rate: float = field(default=0.015, metadata={"help": "Learning rate of the upper level."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of the upper level, on all parameters."})
    max_grad_norm: float = field(default=10.0, metadata={"help": "Bound on the upper gradient norm; 0 for none."})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "Upper batch per device."})
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Set from num_alternations; leave it out."}
    )
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps or epoch."})

    def __post_init__(self) -> None:
        self._check_ranges()
        self._set_epochs()
        self._check_lower_optimization()
        super().__post_init__()

    def _check_ranges(self) -> None:
        self._set_coupling()
        check_at_least(self, **_BISSL_AT_LEAST)
        for name in (
            "target_pull", "proximal_weight", "learning_rate", "lower_learning_rate", "lower_head_learning_rate"
        ):  # fmt: skip
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; it must be a finite number above 0.")
        if self.solver == "none" and self.direct_weight == 0:
            raise ValueError(
                "solver is 'none' and direct_weight 0, so that nothing would move theta_D. Set direct_weight above 0."
            )
        for name in ("lower_momentum", "upper_adaptation_strength"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be between 0 and 1.")
        for name, allowed in (
            ("solver", SOLVERS),
            ("curvature_mode", CURVATURE_MODES),
            ("curvature_kind", CURVATURE_KINDS),
            ("export_level", (*EXPORT_LEVELS, "best")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.lower_gradient_cache and self.lower_micro_batch_size is None:
            raise ValueError(
                "lower_gradient_cache is on, and lower_micro_batch_size is not set; set it to the size of the parts."
            )
        if self.solver == "blockwise_cg" and self.solver_tolerance > 0:
            raise ValueError(
                f"solver_tolerance is {self.solver_tolerance}, and solver 'blockwise_cg' has no stopping rule: its "
                "recursion does not follow the residual. Set solver_tolerance to 0 or solver to 'cg'."
            )

    def _set_coupling(self) -> None:
        """Fills in what couples the levels: exactly one of `target_pull` and `proximal_weight`, and the damping."""
        if self.target_pull is not None and self.proximal_weight is not None:
            raise ValueError(
                f"target_pull is {self.target_pull} and proximal_weight {self.proximal_weight}; the first finds the "
                "second. Leave one of them out."
            )
        if self.target_pull is None and self.proximal_weight is None:
            self.target_pull = TYPICAL_PULL
        if self.damping is None:
            self.damping = "auto" if self.proximal_weight is None else PAPER_DAMPING
        if isinstance(self.damping, str) and self.damping != "auto":
            try:
                self.damping = float(self.damping)
            except ValueError as error:
                raise ValueError(f"damping is {self.damping!r}; it must be a number or 'auto'.") from error
        if self.damping != "auto":
            check_at_least(self, damping=0)

    @property
    def takes_second_derivatives(self) -> bool:
        """Whether the solver takes products with the curvature."""
        return SOLVERS[self.solver].second_order

    def _set_epochs(self) -> None:
        if self.num_train_epochs is not None and self.num_train_epochs != self.num_alternations:
            raise ValueError(
                f"num_train_epochs is {self.num_train_epochs} and num_alternations {self.num_alternations}; "
                f"{REFUSED_BY_ALTERNATIONS['num_train_epochs']}."
            )
        if self.max_steps > 0:
            raise ValueError(f"max_steps is {self.max_steps}; {REFUSED_BY_ALTERNATIONS['max_steps']}.")
        self.num_train_epochs = float(self.num_alternations)

    def _check_lower_optimization(self) -> None:
        options = parse_optimizer_options(self.lower_optim_args, field="lower_optim_args")
        if takes_momentum(self.lower_optim, field="lower_optim"):
            options.setdefault("momentum", self.lower_momentum)
        self.lower_optimizer_options = options
        self.lower_lr_scheduler_kwargs = checked_options(
            self.lower_lr_scheduler_type, self.lower_lr_scheduler_kwargs, field="lower_lr_scheduler_type"
        )
        total = self.num_alternations * self.lower_steps
        if self.get_lower_warmup_steps() > total:
            raise ValueError(
                f"lower_warmup_steps is {self.lower_warmup_steps}; a run has {total} lower steps (num_alternations x "
                "lower_steps)."
            )

    def level(self, name: str = "upper", *, num_steps: int | None = None) -> LevelSettings:
        """Returns how the `"lower"` or the `"upper"` level is optimized over the run."""
        if name == "upper":
            return super().level(name, num_steps=num_steps or self.num_alternations * self.upper_steps)
        if name != "lower":
            raise ValueError(f"name is {name!r}; it must be 'lower' or 'upper'.")
        return LevelSettings(
            prefix="lower_",
            optim=self.lower_optim,
            optimizer_options=self.lower_optimizer_options,
            learning_rate=self.lower_learning_rate,
            weight_decay=self.lower_weight_decay,
            schedule=self.lower_lr_scheduler_type,
            schedule_options=self.lower_lr_scheduler_kwargs,  # type: ignore[arg-type] # read from text by now
            num_steps=num_steps or self.num_alternations * self.lower_steps,
            warmup_steps=self.get_lower_warmup_steps(),
            max_grad_norm=self.lower_max_grad_norm,
            head_learning_rate=self.lower_head_learning_rate,
        )

    def solve_settings(self) -> SolveSettings:
        """Returns how the linear systems of the upper steps are solved."""
        return SolveSettings(
            solver=self.solver,
            max_iterations=self.solver_max_iterations,
            tolerance=self.solver_tolerance,
            curvature_mode=self.curvature_mode,
            curvature_kind=self.curvature_kind,
            memory_size=self.solver_memory,
            per_tensor=self.solver_per_tensor,
            full_precision=self.fp16,
        )

    def get_lower_warmup_steps(self) -> int:
        """Number of warm-up steps of the lower level."""
        total = self.num_alternations * self.lower_steps
        return round(self.lower_warmup_steps * total) if self.lower_warmup_steps < 1 else int(self.lower_warmup_steps)
