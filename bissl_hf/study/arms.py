"""The arms of a study: what they are, which settings each may choose among, and whether they fit together."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..cli.refusal import close_matches
from ..trainer.training_args import (
    BiSSLTrainingArguments,
    JointTrainingArguments,
    PretextTrainingArguments,
    ResumableTrainingArguments,
)
from .fields import as_field, as_mapping

ARGUMENTS_OF: dict[str, type[ResumableTrainingArguments]] = {
    "conventional": PretextTrainingArguments,
    "bissl": BiSSLTrainingArguments,
    "joint": JointTrainingArguments,
}
KINDS = tuple(ARGUMENTS_OF)
MATCHES = {"conventional": ("steps", "wall_clock"), "joint": ("steps", "wall_clock", "rows"), "bissl": ("steps",)}
COMMON_NAME = "pretrain"
LABELLED_BATCH = "per_device_labelled_batch_size"
_SET_BY_STUDY = ("output_dir", "seed", "data_seed", "use_cpu", "resume_from_checkpoint")
LENGTH = ("max_steps", "num_train_epochs")


@dataclass(frozen=True)
class Arm:
    """One way from the pre-trained backbone to the one that is fine-tuned.

    Args:
        name (`str`): in folders, tables and figures.
        kind (`str`): `"bissl"`; `"conventional"`, which goes on with the pretext task alone; or `"joint"`, which
            goes on with the sum of both losses ([`JointTrainer`]).
        match (`str`, *optional*, defaults to `"steps"`): to what a conventional or joint arm is held: as many pretext
            steps as BiSSL takes (`"steps"`); these, and as many labelled images as the upper steps of the first BiSSL
            arm read (`"rows"`, of a joint arm); or as many steps as fit into the seconds that the first BiSSL arm took
            (`"wall_clock"`), with the settings and at the pace of the first other arm of its kind.
        overrides (`Mapping`, *optional*): fields of [`BiSSLTrainingArguments`], [`PretextTrainingArguments`] or
            [`JointTrainingArguments`], by kind, that differ from the study's. `max_steps` of the latter two is the
            number of steps after the common ones.
        search (`Mapping` or `Sequence[Mapping]`, *optional*): settings of which one is chosen on the validation split,
            for each set and number of labels: a list of values for each field, of which all combinations are tried,
            or a list of combinations.

    Raises:
        `ValueError`: for an unknown kind or match, a name that cannot be that of a folder, fields that its arguments
            do not have, or a search that its match rules out.
    """

    name: str
    kind: str
    match: str = "steps"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    search: Any = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"An arm is named {self.name!r}; use letters, digits, '-' and '_'.")
        if self.name == COMMON_NAME:
            raise ValueError(
                f"An arm is named {self.name!r}, like the folder of the common steps; choose another name."
            )
        self._check_choice("kind", KINDS)
        self._check_choice("match", MATCHES[self.kind])
        if not isinstance(self.overrides, Mapping):
            raise ValueError(f"overrides of the arm {self.name} is {self.overrides!r}; it must hold fields.")
        origin = f"arm {self.name}"
        kind = ARGUMENTS_OF[self.kind]
        own = LENGTH if self.kind == "bissl" else LENGTH[1:]
        object.__setattr__(self, "overrides", checked_fields(kind, origin, self.overrides, own=own))
        tries = [
            checked_fields(kind, f"the search of {origin}", each, own=own)
            for each in _combinations(self.search, origin)
        ]
        object.__setattr__(self, "search", tuple(tries))
        self._check_match()

    def _check_choice(self, name: str, allowed: Sequence[str]) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"The {name} of the arm {self.name} is {getattr(self, name)!r}; it must be one of "
                f"{', '.join(allowed)}."
            )

    def _check_match(self) -> None:
        if self.match == "wall_clock" and self.search:
            raise ValueError(
                f"The arm {self.name} has a search and the match 'wall_clock', under which it takes the setting of "
                "another arm; leave the search out."
            )
        held = {"rows": LABELLED_BATCH, "wall_clock": "max_steps"}.get(self.match)
        if held is not None and any(held in settings for settings in (self.overrides, *self.search)):
            raise ValueError(
                f"The arm {self.name} sets {held}, which its match {self.match!r} decides; leave one of them out."
            )

    @property
    def is_step_matched(self) -> bool:
        """Whether it goes on with the pretext task alone, not held to the time of another."""
        return self.kind == "conventional" and self.match == "steps"

    @property
    def variants(self) -> list["Arm"]:
        """An arm per setting of its search, named by its number; without a search itself alone."""
        if not self.search:
            return [self]
        return [
            replace(self, name=f"{self.name}-try{number}", overrides={**self.overrides, **setting}, search=())
            for number, setting in enumerate(self.search, 1)
        ]

    @classmethod
    def read(cls, source: Any) -> "Arm":
        """Reads an arm from a mapping, or from the text of one in JSON.

        Raises:
            `ValueError`: if it is neither, or has fields too many or too few.
        """
        content = as_mapping(source, "An arm")
        known = [known.name for known in fields(cls)]
        if unknown := sorted(set(content) - set(known)):
            raise ValueError(f"An arm has the unknown field {unknown[0]!r}; it may have {', '.join(known)}.")
        if missing := [name for name in ("name", "kind") if name not in content]:
            raise ValueError(f"The arm {content} has no field {missing[0]!r}.")
        return cls(**content)


def _combinations(search: Any, origin: str) -> list[dict[str, Any]]:
    """Returns the settings to try, in the order in which they are written."""
    if isinstance(search, Mapping):
        for name, values in search.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"The search of {origin} sets {name} to {values!r}; it must be a list of values.")
        combined = [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
        found = combined if search else []
    elif isinstance(search, Sequence) and all(isinstance(each, Mapping) for each in search):
        found = [dict(each) for each in search]
    else:
        raise ValueError(
            f"The search of {origin} is {search!r}; it must hold a list of values for each field, or a list of "
            "settings."
        )
    if any(each in found[:index] for index, each in enumerate(found)):
        raise ValueError(f"The search of {origin} is {found}, which tries a setting twice; name each once.")
    return found


def checked_fields(
    kind: type[ResumableTrainingArguments], origin: str, settings: Mapping[str, Any], *, own: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the fields of training arguments that a user may set, each of its own type.

    Args:
        kind (`type`): the arguments.
        origin (`str`): where the fields are set, for messages.
        settings (`Mapping`)
        own (`Sequence[str]`, *optional*): further fields that the study sets by itself.

    Raises:
        `ValueError`: for a field that they do not have or that the study sets by itself, or a value of another type.
    """
    known = [known.name for known in fields(kind) if known.init]
    for name in settings:
        if name in (*_SET_BY_STUDY, *own):
            raise ValueError(f"{origin} sets {name}, which the study sets by itself; leave it out.")
        if name not in known:
            hint = close_matches(str(name), known, ".")
            raise ValueError(f"{origin} sets {name!r}, which {kind.__name__} does not have{hint}")
    return {name: as_field(kind, name, value, origin=origin) for name, value in settings.items()}


def check_arms(arms: Sequence[Arm]) -> None:
    """Refuses arms that do not fit together.

    Raises:
        `ValueError`: if names are repeated, none is the conventional pipeline that the others are compared with, an
            arm has nothing to be matched to, or the arms do not try equally many settings.
    """
    names = [name for arm in arms for name in {arm.name, *(variant.name for variant in arm.variants)}]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Several arms are named {repeated[0]!r}; each needs a name of its own.")
    for arm in arms:
        _check_company(arm, arms)
    if not any(arm.is_step_matched for arm in arms):
        raise ValueError(
            f"arms are {', '.join(names)}, and none is of the kind conventional and matched by steps, with which the "
            "others are compared; add one."
        )
    _check_tries(arms)


def _check_company(arm: Arm, arms: Sequence[Arm]) -> None:
    if arm.match != "steps" and all(other.kind != "bissl" for other in arms):
        raise ValueError(f"The match of the arm {arm.name} is {arm.match!r}, which is for an arm beside a BiSSL arm.")
    paced = arm.kind == "joint" and arm.match == "wall_clock"
    if paced and all(other.kind != "joint" or other.match == "wall_clock" for other in arms):
        raise ValueError(
            f"The match of the joint arm {arm.name} is 'wall_clock', at the pace of another joint arm; add one with "
            "another match."
        )


def _check_tries(arms: Sequence[Arm]) -> None:
    """Conventional arms may do without a search: the match has set the one thing that they could choose."""
    if not any(arm.search for arm in arms):
        return
    counts = {
        arm.name: len(arm.search)
        for arm in arms
        if arm.match != "wall_clock" and (arm.search or arm.kind != "conventional")
    }
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise ValueError(
            f"The arms try different numbers of settings ({listed}); give the same number to each, so that none has "
            "the better chance."
        )
