"""What a study compares, as its YAML file says it."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from transformers import CONFIG_MAPPING, PretrainedConfig

from ..cli.images import ViewArguments
from ..cli.pairs import check_pairs
from ..cli.refusal import close_matches
from ..data.preprocessing import Preprocessing
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
from .arms import KINDS, LABELLED_BATCH, LENGTH, Arm, check_arms, checked_fields
from .fields import as_mapping, naming

logger = logging.getLogger(__name__)

# Fields of training arguments on which no result depends.
_INCIDENTAL = (
    *("save_strategy", "save_steps", "save_total_limit", "logging_strategy", "logging_steps", "report_to"),
    *("disable_tqdm", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
)
# The first of the seeds on which settings are chosen: no run that is compared has taken part in a choice.
CHOICE_SEED = 1000
_AT_LEAST = {
    "seeds": 1,
    "choice_seeds": 1,
    "pretrain_steps": 1,
    "search_trials": 0,
    "split_seed": 0,
    "curve_every": 0,
}
ArgumentsType = TypeVar("ArgumentsType", bound=ResumableTrainingArguments)


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
        metadata={"help": "The arms, each as JSON with name, kind and maybe match, overrides and search."},
    )
    rival: str | None = field(
        default=None, metadata={"help": "An arm with which the others are compared too, beside the conventional one."}
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each arm, with the seeds 0, 1, ..."})
    choice_seeds: int = field(
        default=2,
        metadata={"help": "Runs that choose among the settings of an arm's search, with the seeds 1000, 1001, ..."},
    )
    search_trials: int = field(
        default=8, metadata={"help": "Pairs of learning rate and weight decay that each run tries; 0 for no search."}
    )
    search_once: bool = field(
        default=False,
        metadata={
            "help": "Choose learning rate and weight decay of each arm once per set and number of labels, on the "
            "choice_seeds, instead of anew for each seed."
        },
    )
    search_learning_rate: list[float] = field(
        default_factory=lambda: [1e-4, 1.0], metadata={"help": "Range of learning rates, drawn log-uniformly."}
    )
    curve_every: int = field(
        default=0, metadata={"help": "Record the test score in fine-tuning every this many steps; 0 for never."}
    )
    own_statistics: bool = field(
        default=True,
        metadata={"help": "Also fine-tune each backbone from the batch-norm statistics that its training has left."},
    )
    search_weight_decay: list[float] = field(
        default_factory=lambda: [1e-5, 1e-2], metadata={"help": "Range of weight decays, drawn log-uniformly."}
    )

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lists()
        self.space = SearchSpace(tuple(self.search_learning_rate), tuple(self.search_weight_decay))  # type: ignore[arg-type]
        stages: tuple[tuple[str, type[ResumableTrainingArguments], tuple[str, ...]], ...] = (
            ("pretrain", PretextTrainingArguments, LENGTH),
            ("bissl", BiSSLTrainingArguments, LENGTH),
            ("finetune", FineTuningArguments, ()),
        )
        for name, kind, own in stages:
            setattr(self, name, checked_fields(kind, name, as_mapping(getattr(self, name) or {}, name), own=own))
        if self.search_once and not self.search_trials:
            raise ValueError("search_once is true and search_trials is 0; there is no search to make once.")
        searched = sorted({"learning_rate", "weight_decay"} & set(self.finetune or ()))
        if self.search_trials and searched:
            raise ValueError(
                f"finetune sets {searched[0]}, which the search chooses; leave it out, or set search_trials to 0."
            )
        self.backbone = as_mapping(self.backbone, "backbone") if self.backbone else None
        self.compared = [Arm.read(source) for source in self.arms]
        check_arms(self.compared)
        names = [arm.name for arm in self.compared]
        if self.rival is not None and self.rival not in names:
            raise ValueError(f"rival is {self.rival!r}; it must be one of the arms {', '.join(names)}.")

    def _check_numbers(self) -> None:
        for name, least in _AT_LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}.")
        if self.seeds > CHOICE_SEED:
            raise ValueError(f"seeds is {self.seeds}; it must be at most {CHOICE_SEED}, where choice_seeds begin.")
        if self.validation_examples is not None and self.validation_examples < 2:
            raise ValueError(f"validation_examples is {self.validation_examples}; it must be at least 2.")

    def _check_lists(self) -> None:
        for name in ("datasets", "train_examples", "arms"):
            values = getattr(self, name)
            if not values or len(set(map(str, values))) < len(values):
                raise ValueError(f"{name} is {values}; it must name at least one, each once.")
        if min(self.train_examples) < 2:
            raise ValueError(f"train_examples is {self.train_examples}; each must be at least 2.")
        folders: dict[str, str] = {}
        for name in self.datasets:
            if (other := folders.setdefault(folder_name(name), name)) != name:
                raise ValueError(
                    f"datasets names {other!r} and {name!r}, whose parts would share a folder; rename one."
                )


def folder_name(dataset: str) -> str:
    """Returns the name of a data set in the folders of its parts."""
    return dataset.strip("/.").replace("/", "--")


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
            for variant in arm.variants:
                args = self.arm_arguments("unused", 0, variant, 1)
                if isinstance(args, BiSSLTrainingArguments):
                    self._warn_if_unmatched(variant, args)

    def _warn_if_unmatched(self, arm: Arm, args: BiSSLTrainingArguments) -> None:
        steps = args.num_alternations * args.lower_steps
        if steps != self.matched_steps:
            logger.warning(
                f"The arm {arm.name} takes {steps} lower steps, and arms matched by steps get {self.matched_steps} "
                "pretext steps: they are not given the same."
            )

    @property
    def preprocessing(self) -> Preprocessing:
        """How images are prepared."""
        return Preprocessing(image_size=self.study.image_size)

    @property
    def baseline(self) -> Arm:
        """The arm with which the others are compared: the first conventional one that is matched by steps."""
        return next(arm for arm in self.study.compared if arm.is_step_matched)

    @property
    def clock_arm(self) -> Arm:
        """The arm whose time or labelled rows those get that are matched to them: the first of BiSSL."""
        return next(arm for arm in self.study.compared if arm.kind == "bissl")

    def pace_arm(self, arm: Arm) -> Arm:
        """The arm that sets the pace and the setting of one that is matched to the time of another: the first of its
        kind that is not."""
        return next(other for other in self.study.compared if other.kind == arm.kind and other.match != "wall_clock")

    @property
    def ordered_arms(self) -> list[Arm]:
        """The arms such that what is matched to another comes after it."""
        return sorted(self.study.compared, key=lambda arm: ("steps", "rows", "wall_clock").index(arm.match))

    @property
    def choice_seeds(self) -> range:
        """The seeds on which settings are chosen; none if no arm has any."""
        count = self.study.choice_seeds if any(self.chooses(arm) for arm in self.study.compared) else 0
        return range(CHOICE_SEED, CHOICE_SEED + count)

    def chooses(self, arm: Arm) -> bool:
        """Whether something of an arm is chosen before the runs that are compared."""
        return bool(arm.search) or (self.study.search_once and arm.match != "wall_clock")

    def timed(self, arm: Arm, pace: Arm) -> Arm:
        """Returns an arm that is matched to the time of another with the setting chosen for the arm of its pace."""
        settings = {name: value for name, value in pace.overrides.items() if name != "max_steps"}
        return replace(arm, overrides={**settings, **arm.overrides})

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
        settings = {**as_mapping(self.study.bissl, "bissl"), **(arm.overrides if arm else {})}
        return self._build(
            BiSSLTrainingArguments, f"arm {arm.name}" if arm else "bissl", settings, folder, seed, eval_strategy="no"
        )

    def arm_arguments(self, folder: str, seed: int, arm: Arm, steps: int) -> ResumableTrainingArguments:
        """Returns the arguments of an arm with this number of pretext steps after the common ones, if it does not say
        how many by itself."""
        if arm.kind == "bissl":
            return self.bissl_arguments(folder, seed, arm)
        steps = arm.overrides.get("max_steps", steps)
        if arm.kind == "joint":
            return self.joint_arguments(folder, seed, arm, steps)
        return self.continue_arguments(folder, seed, arm, steps)

    def continue_arguments(self, folder: str, seed: int, arm: Arm, steps: int) -> PretextTrainingArguments:
        """Returns the arguments of the further pretext steps of a conventional arm: BiSSL's lower level on its own,
        with its optimizer, schedule and batches."""
        settings = {**self._lower_settings(folder, seed, steps), "max_steps": steps, **arm.overrides}
        return self._build(PretextTrainingArguments, f"arm {arm.name}", settings, folder, seed)

    def joint_arguments(self, folder: str, seed: int, arm: Arm, steps: int) -> JointTrainingArguments:
        """Returns the arguments of joint training: likewise, with the labelled batches of BiSSL's upper level."""
        settings = {
            **self._lower_settings(folder, seed, steps),
            LABELLED_BATCH: self.bissl_arguments(folder, seed).per_device_train_batch_size,
            "max_steps": steps,
            **arm.overrides,
        }
        return self._build(JointTrainingArguments, f"arm {arm.name}", settings, folder, seed)

    def row_matched(self, arm: Arm, clock: Arm) -> Arm:
        """Returns a joint arm whose steps read as many labelled images, rounded up, as the upper steps of `clock`."""
        args = self.bissl_arguments("unused", 0, clock)
        rows = args.num_alternations * args.upper_steps * args.per_device_train_batch_size
        steps = arm.overrides.get("max_steps", self.matched_steps)
        return replace(arm, match="steps", overrides={**arm.overrides, LABELLED_BATCH: -(-rows // steps)})

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
            "channels_last": lower.channels_last,
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
        settings = {**self.common_settings(seed), **_described(arm), "bissl": _decisive(self.study.bissl)}
        if arm.match != "steps":
            settings["clock"] = _described(self.clock_arm)
        if arm.match == "wall_clock":
            settings["pace"] = _described(self.pace_arm(arm))
        return settings

    def run_settings(self, arm: Arm, dataset: str, train_examples: int, seed: int) -> dict[str, Any]:
        """Returns what the result of an arm on a set depends on."""
        names = (
            *("validation_examples", "search_trials", "search_learning_rate", "search_weight_decay"),
            *("search_once", "curve_every", "own_statistics"),
        )
        settings = {
            **self.arm_settings(arm, seed),
            "dataset": dataset,
            "train_examples": train_examples,
            "finetune": _decisive(self.study.finetune),
            **{name: getattr(self.study, name) for name in names},
        }
        if self.choice_seeds:
            settings["choice_seeds"] = len(self.choice_seeds)
        return settings

    def _build(
        self, kind: type[ArgumentsType], origin: str, settings: Any, folder: str, seed: int, **defaults: Any
    ) -> ArgumentsType:
        common = {"report_to": "none", "save_total_limit": 1, "use_cpu": self.study.use_cpu}
        with naming(origin):
            args = kind(**{"output_dir": folder, "seed": seed, **common, **defaults, **settings})
            if not isinstance(args, FineTuningArguments):
                check_pairs(args)
        return args


def _described(arm: Arm) -> dict[str, Any]:
    """An arm as it is kept beside results."""
    return {**asdict(arm), "overrides": _decisive(arm.overrides), "search": [_decisive(each) for each in arm.search]}


def _decisive(settings: Any) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in _INCIDENTAL}
