"""What a study compares, as its YAML file says it."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..cli.arguments import close_matches
from ..cli.images import ViewArguments
from ..cli.pairs import check_pairs
from ..models.configuration_backbone import as_config, resnet18_config
from ..models.configuration_simclr import SimCLRConfig
from ..trainer.search import SearchSpace, check_backend
from ..trainer.training_args import (
    BiSSLTrainingArguments,
    FineTuningArguments,
    JointTrainingArguments,
    PretextTrainingArguments,
    ResumableTrainingArguments,
)
from .fields import as_field

logger = logging.getLogger(__name__)

_ARGUMENTS_OF = {
    "conventional": PretextTrainingArguments,
    "bissl": BiSSLTrainingArguments,
    "joint": JointTrainingArguments,
}
KINDS = tuple(_ARGUMENTS_OF)
COMMON_NAME = "pretrain"
MATCHES = ("steps", "wall_clock")
_SET_BY_STUDY = ("output_dir", "seed", "data_seed", "use_cpu", "resume_from_checkpoint")
# Fields of training arguments on which no result depends.
_INCIDENTAL = (
    *("save_strategy", "save_steps", "save_total_limit", "logging_strategy", "logging_steps", "report_to"),
    *("disable_tqdm", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
)
ArgumentsType = TypeVar("ArgumentsType", bound=ResumableTrainingArguments)


@dataclass(frozen=True)
class Arm:
    """One way from the pre-trained backbone to the one that is fine-tuned.

    Args:
        name (`str`): in folders, tables and figures.
        kind (`str`): `"bissl"`; `"conventional"`, which goes on with the pretext task alone; or `"joint"`, which
            goes on with the sum of both losses ([`JointTrainer`]).
        match (`str`, *optional*, defaults to `"steps"`): of a conventional arm: as many pretext steps as BiSSL takes
            (`"steps"`), or as many as fit into the seconds that the first BiSSL arm took (`"wall_clock"`), at the pace
            of the first arm matched by steps.
        overrides (`Mapping`, *optional*): fields of [`BiSSLTrainingArguments`], [`PretextTrainingArguments`] or
            [`JointTrainingArguments`], by kind, that differ from the study's.

    Raises:
        `ValueError`: for an unknown kind or match, or a name that cannot be that of a folder.
    """

    name: str
    kind: str
    match: str = "steps"
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"An arm is named {self.name!r}; use letters, digits, '-' and '_'.")
        if self.name == COMMON_NAME:
            raise ValueError(
                f"An arm is named {self.name!r}, like the folder of the common steps; choose another name."
            )
        for name, allowed in (("kind", KINDS), ("match", MATCHES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"The {name} of the arm {self.name} is {getattr(self, name)!r}; it must be one of "
                    f"{', '.join(allowed)}."
                )
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides of the arm {self.name} is {self.overrides!r}; it must hold fields.")
        checked = _checked_fields(_ARGUMENTS_OF[self.kind], f"arm {self.name}", self.overrides)
        object.__setattr__(self, "overrides", checked)

    @property
    def is_step_matched(self) -> bool:
        """Whether it goes on with the pretext task alone, for as many steps as BiSSL takes."""
        return self.kind == "conventional" and self.match == "steps"

    @classmethod
    def read(cls, source: Any) -> "Arm":
        """Reads an arm from a mapping, or from the text of one in JSON.

        Raises:
            `ValueError`: if it is neither, or has fields too many or too few.
        """
        content = _mapping(source, "An arm")
        known = [known.name for known in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"An arm has the unknown field {unknown[0]!r}; it may have {', '.join(known)}.")
        if missing := [name for name in ("name", "kind") if name not in content]:
            raise ValueError(f"The arm {content} has no field {missing[0]!r}.")
        return cls(**content)


@dataclass
class StudyArguments:
    """What is compared, on what, and with which budget."""

    output_dir: str = field(metadata={"help": "Folder of the study; a study that is begun there goes on."})
    report_only: bool = field(default=False, metadata={"help": "Make table and figure from results.json anew."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    pretext_dataset: str = field(default="digits", metadata={"help": "Images for the pretext task, without labels."})
    datasets: list[str] = field(default_factory=lambda: ["digits"], metadata={"help": "Downstream data sets."})
    train_examples: list[int] = field(
        default_factory=lambda: [200], metadata={"help": "Numbers of labelled training images, each with each set."}
    )
    validation_examples: int | None = field(
        default=None, metadata={"help": "Validation images on which choices are made, at most; all if not given."}
    )
    image_size: int = field(default=96, metadata={"help": "Side of the square images, in pixels."})
    split_seed: int = field(default=42, metadata={"help": "Decides the splits of sets that lack official ones."})
    backbone: dict | str | None = field(
        default=None, metadata={"help": "Configuration with its model_type, as JSON; a ResNet-18 if not given."}
    )
    projection_dims: list[int] = field(
        default_factory=lambda: [256, 256, 256], metadata={"help": "Widths of the projection head."}
    )
    temperature: float = field(default=0.5, metadata={"help": "Temperature of the NT-Xent loss."})
    pretrain_steps: int = field(default=1000, metadata={"help": "Pretext steps that all arms have in common."})
    pretrain: dict | str | None = field(
        default=None, metadata={"help": "Fields of recipes/pretrain.py for these steps, as JSON."}
    )
    bissl: dict | str | None = field(
        default=None, metadata={"help": "Fields of recipes/bissl.py for all BiSSL arms, as JSON."}
    )
    finetune: dict | str | None = field(
        default=None, metadata={"help": "Fields of recipes/finetune.py for all arms, as JSON."}
    )
    arms: list[str] = field(
        default_factory=lambda: [json.dumps({"name": kind, "kind": kind}) for kind in KINDS[:2]],
        metadata={"help": "The arms, each as JSON with name, kind and maybe match and overrides."},
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each arm, with the seeds 0, 1, ..."})
    search_trials: int = field(
        default=8, metadata={"help": "Pairs of learning rate and weight decay that each run tries; 0 for no search."}
    )
    search_learning_rate: list[float] = field(
        default_factory=lambda: [1e-4, 1.0], metadata={"help": "Range of learning rates, drawn log-uniformly."}
    )
    search_weight_decay: list[float] = field(
        default_factory=lambda: [1e-5, 1e-2], metadata={"help": "Range of weight decays, drawn log-uniformly."}
    )

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("pretrain_steps", 1), ("search_trials", 0), ("split_seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        for name in ("datasets", "train_examples", "arms"):
            values = getattr(self, name)
            if not values or len(set(map(str, values))) < len(values):
                raise ValueError(f"{name} is {values}; it must name at least one, each once.")
        folders: dict[str, str] = {}
        for name in self.datasets:
            if (other := folders.setdefault(folder_name(name), name)) != name:
                raise ValueError(
                    f"datasets names {other!r} and {name!r}, whose parts would share a folder; rename one."
                )
        if self.validation_examples is not None and self.validation_examples < 2:
            raise ValueError(f"validation_examples is {self.validation_examples}; it must be at least 2.")
        if min(self.train_examples) < 2:
            raise ValueError(f"train_examples is {self.train_examples}; each must be at least 2.")
        self.space = SearchSpace(tuple(self.search_learning_rate), tuple(self.search_weight_decay))  # type: ignore[arg-type]
        for name, kind in (
            ("pretrain", PretextTrainingArguments),
            ("bissl", BiSSLTrainingArguments),
            ("finetune", FineTuningArguments),
        ):
            setattr(self, name, _checked_fields(kind, name, _mapping(getattr(self, name) or {}, name)))
        searched = sorted({"learning_rate", "weight_decay"} & set(self.finetune or ()))
        if self.search_trials and searched:
            raise ValueError(
                f"finetune sets {searched[0]}, which the search chooses; leave it out, or set search_trials to 0."
            )
        self.backbone = _mapping(self.backbone, "backbone") if self.backbone else None
        self.compared = [Arm.read(source) for source in self.arms]
        _check_arms(self.compared)


def folder_name(dataset: str) -> str:
    """Returns the name of a data set in the folders of its parts."""
    return dataset.strip("/.").replace("/", "--")


def _checked_fields(
    kind: type[ResumableTrainingArguments], origin: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the fields of training arguments that a user may set, each of its own type."""
    own = _SET_BY_STUDY if kind is FineTuningArguments else (*_SET_BY_STUDY, "max_steps", "num_train_epochs")
    known = [known.name for known in fields(kind) if known.init]
    for name in settings:
        if name in own:
            raise ValueError(f"{origin} sets {name}, which the study sets by itself; leave it out.")
        if name not in known:
            hint = close_matches(str(name), known, ".")
            raise ValueError(f"{origin} sets {name!r}, which {kind.__name__} does not have{hint}")
    return {name: as_field(kind, name, value, origin=origin) for name, value in settings.items()}


def _backbone_config(settings: Mapping[str, Any]) -> PretrainedConfig:
    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        hint = close_matches(kind, CONFIG_MAPPING, ", such as resnet or vit.")
        raise ValueError(f"model_type of backbone is {kind!r}; it must be one of transformers' types{hint}")
    known = CONFIG_MAPPING[kind]()
    for name in settings:
        if not hasattr(known, name):
            hint = close_matches(name, known.to_dict(), ".")
            raise ValueError(f"backbone sets {name!r}, which a {kind} does not have{hint}")
    return as_config(dict(settings))


def _check_arms(arms: Sequence[Arm]) -> None:
    names = [arm.name for arm in arms]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several arms are named {repeated[0]!r}; each needs a name of its own.")
    for arm in arms:
        if arm.match == "wall_clock" and (arm.kind != "conventional" or all(a.kind != "bissl" for a in arms)):
            raise ValueError(
                f"The match of the arm {arm.name} is 'wall_clock', which is for a conventional arm beside a BiSSL arm."
            )
    if not any(arm.is_step_matched for arm in arms):
        raise ValueError(
            f"arms are {', '.join(names)}, and none is of the kind conventional and matched by steps, with which the "
            "others are compared; add one."
        )


@dataclass
class Plan:
    """A study and how its views are made.

    Args:
        study ([`StudyArguments`])
        views ([`ViewArguments`]): of the pretext task; their crops and flips are those of downstream training too.

    Raises:
        `ValueError`: if settings of a stage are unknown, out of range or set by the study itself.
    """

    study: StudyArguments
    views: ViewArguments

    def __post_init__(self) -> None:
        if self.study.search_trials:
            check_backend("optuna", field="The backend of search_trials")
        self.pretext_config()
        self.pretrain_arguments("unused", 0)
        self.finetune_arguments("unused", 0)
        for arm in self.study.compared:
            args = self.arm_arguments("unused", 0, arm, 1)
            if isinstance(args, BiSSLTrainingArguments):
                self._warn_if_unmatched(arm, args)

    def _warn_if_unmatched(self, arm: Arm, args: BiSSLTrainingArguments) -> None:
        steps = args.num_alternations * args.lower_steps
        if steps != self.matched_steps:
            logger.warning(
                f"The arm {arm.name} takes {steps} lower steps, and arms matched by steps get {self.matched_steps} "
                "pretext steps: they are not given the same."
            )

    @property
    def baseline(self) -> Arm:
        """The arm with which the others are compared: the first conventional one that is matched by steps."""
        return next(arm for arm in self.study.compared if arm.is_step_matched)

    @property
    def clock_arm(self) -> Arm:
        """The arm whose time a conventional arm with `match="wall_clock"` gets: the first of BiSSL."""
        return next(arm for arm in self.study.compared if arm.kind == "bissl")

    @property
    def matched_steps(self) -> int:
        """Pretext steps that BiSSL takes after the common ones."""
        args = self.bissl_arguments("unused", 0)
        return args.num_alternations * args.lower_steps

    def pretext_config(self) -> SimCLRConfig:
        """Returns the configuration of the pretext model."""
        study = self.study
        backbone = _backbone_config(study.backbone) if isinstance(study.backbone, dict) else resnet18_config()
        return SimCLRConfig(backbone, projection_dims=study.projection_dims, temperature=study.temperature)

    def pretrain_arguments(self, folder: str, seed: int) -> PretextTrainingArguments:
        """Returns the arguments of the pretext steps that all arms share."""
        return self._build(
            PretextTrainingArguments,
            "pretrain",
            self.study.pretrain,
            folder,
            seed,
            max_steps=self.study.pretrain_steps,
        )

    def bissl_arguments(self, folder: str, seed: int, arm: Arm | None = None) -> BiSSLTrainingArguments:
        """Returns the arguments of an arm of BiSSL, or of BiSSL without an arm's overrides."""
        settings = {**_mapping(self.study.bissl, "bissl"), **(arm.overrides if arm else {})}
        return self._build(
            BiSSLTrainingArguments, f"arm {arm.name}" if arm else "bissl", settings, folder, seed, eval_strategy="no"
        )

    def arm_arguments(self, folder: str, seed: int, arm: Arm, steps: int) -> ResumableTrainingArguments:
        """Returns the arguments of an arm that takes so many pretext steps after the common ones; BiSSL knows how many
        by itself."""
        if arm.kind == "bissl":
            return self.bissl_arguments(folder, seed, arm)
        if arm.kind == "joint":
            return self.joint_arguments(folder, seed, arm, steps)
        return self.continue_arguments(folder, seed, arm, steps)

    def continue_arguments(self, folder: str, seed: int, arm: Arm, steps: int) -> PretextTrainingArguments:
        """Returns the arguments of the further pretext steps of a conventional arm: BiSSL's lower level on its own,
        with its optimizer, schedule and batches."""
        settings = {**self._lower_settings(folder, seed, steps), **arm.overrides}
        return self._build(PretextTrainingArguments, f"arm {arm.name}", settings, folder, seed, max_steps=steps)

    def joint_arguments(self, folder: str, seed: int, arm: Arm, steps: int) -> JointTrainingArguments:
        """Returns the arguments of joint training: likewise, with the labelled batches of BiSSL's upper level."""
        batch = self.bissl_arguments(folder, seed).per_device_train_batch_size
        settings = {
            **self._lower_settings(folder, seed, steps),
            "per_device_labelled_batch_size": batch,
            **arm.overrides,
        }
        return self._build(JointTrainingArguments, f"arm {arm.name}", settings, folder, seed, max_steps=steps)

    def _lower_settings(self, folder: str, seed: int, steps: int) -> dict[str, Any]:
        lower = self.bissl_arguments(folder, seed)
        return {
            "optim": lower.lower_optim,
            "optim_args": ",".join(f"{name}={value}" for name, value in lower.lower_optimizer_options.items()) or None,
            "learning_rate": lower.lower_learning_rate,
            "weight_decay": lower.lower_weight_decay,
            "lr_scheduler_type": lower.lower_lr_scheduler_type,
            "lr_scheduler_kwargs": lower.lower_lr_scheduler_kwargs,
            "warmup_steps": round(lower.get_lower_warmup_steps() / self.matched_steps * steps),
            "per_device_train_batch_size": lower.per_device_lower_batch_size,
            "max_grad_norm": lower.lower_max_grad_norm,
            "bf16": lower.bf16,
            "fp16": lower.fp16,
        }

    def finetune_arguments(self, folder: str, seed: int) -> FineTuningArguments:
        """Returns the arguments of fine-tuning, the same for all arms."""
        return self._build(FineTuningArguments, "finetune", self.study.finetune, folder, seed)

    def common_settings(self, seed: int) -> dict[str, Any]:
        """Returns what the common pretext steps of a seed depend on."""
        names = ("pretext_dataset", "image_size", "split_seed", "backbone", "projection_dims", "temperature")
        return {
            **{name: getattr(self.study, name) for name in (*names, "pretrain_steps")},
            **asdict(self.views),
            "pretrain": _decisive(self.study.pretrain),
            "seed": seed,
        }

    def arm_settings(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Returns what the backbone of an arm depends on, but for its labelled images."""
        settings = {**self.common_settings(seed), **asdict(arm), "overrides": _decisive(arm.overrides)}
        settings["bissl"] = _decisive(self.study.bissl)
        if arm.match == "wall_clock":
            settings["clock"], settings["pace"] = asdict(self.clock_arm), asdict(self.baseline)
        return settings

    def run_settings(self, arm: Arm, dataset: str, train_examples: int, seed: int) -> dict[str, Any]:
        """Returns what the result of an arm on a set depends on."""
        names = ("validation_examples", "search_trials", "search_learning_rate", "search_weight_decay")
        return {
            **self.arm_settings(arm, seed),
            "dataset": dataset,
            "train_examples": train_examples,
            "finetune": _decisive(self.study.finetune),
            **{name: getattr(self.study, name) for name in names},
        }

    def _build(
        self, kind: type[ArgumentsType], origin: str, settings: Any, folder: str, seed: int, **defaults: Any
    ) -> ArgumentsType:
        common = {"report_to": "none", "save_total_limit": 1, "use_cpu": self.study.use_cpu}
        with naming(origin):
            args = kind(**{"output_dir": folder, "seed": seed, **common, **defaults, **settings})
            if not isinstance(args, FineTuningArguments):
                check_pairs(args)
        return args


@contextmanager
def naming(origin: str) -> Iterator[None]:
    """Says in front of an error which settings it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _decisive(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _INCIDENTAL}


def _mapping(source: Any, name: str) -> dict[str, Any]:
    content = source
    if isinstance(source, str):
        try:
            content = json.loads(source)
        except json.JSONDecodeError:
            content = None
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} is {source!r}; it must hold `field: value` pairs.")
    return dict(content)
