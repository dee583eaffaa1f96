"""Which parameters two models have in common: the backbone theta."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from transformers import PreTrainedModel
from transformers.utils import logging

from .backbone import backbone_of, backbone_parameters

logger = logging.get_logger(__name__)


def _common_parameters(lower: PreTrainedModel, upper: PreTrainedModel) -> dict[str, tuple[bool, bool]]:
    """Returns which parameters both backbones have, by name and shape, and whether each level trains them."""
    others = backbone_parameters(upper)
    return {
        name: (parameter.requires_grad, others[name].requires_grad)
        for name, parameter in backbone_parameters(lower).items()
        if name in others and others[name].shape == parameter.shape
    }


def find_shared_parameters(
    lower: PreTrainedModel, upper: PreTrainedModel, unshared_parameters: Sequence[str]
) -> tuple[str, ...]:
    """Returns the names, below the backbones, of the parameters that both have, with the same shape, trainable in
    both. One that only one level trains is that level's own.

    Raises:
        `ValueError`: if there are none, or if another parameter of either backbone matches no pattern of
            `unshared_parameters`.
    """
    common = _common_parameters(lower, upper)
    shared = tuple(name for name, trained in common.items() if all(trained))
    if not shared:
        raise ValueError(_no_backbone(lower, upper, common))
    differences = []
    for level, model in (("lower", lower), ("upper", upper)):
        others = [
            f"{name} {tuple(parameter.shape)}"
            for name, parameter in backbone_parameters(model).items()
            if name not in common and not _matches(name, unshared_parameters)
        ]
        if others:
            differences.append(f"only in the {level} model, or shaped differently in the other: {_listed(others)}")
    if differences:
        raise ValueError(
            f"The two backbones are not the same; {'; '.join(differences)}. Use models on the same backbone, or name "
            "what may differ in unshared_parameters."
        )
    return shared


def _no_backbone(lower: PreTrainedModel, upper: PreTrainedModel, common: Mapping[str, tuple[bool, bool]]) -> str:
    """Says why two models have no parameters to share."""
    levels = [level for number, level in enumerate(("lower", "upper")) if not any(t[number] for t in common.values())]
    if common:
        frozen = f"that of the {' and of the '.join(levels)} model is frozen" if levels else "each trains another part"
        return (
            f"{type(lower).__name__} and {type(upper).__name__} have no trainable parameter of their backbone in "
            f"common: {frozen}. BiSSL trains the backbone in both levels; make it trainable: "
            "model.base_model.requires_grad_(True)."
        )
    return (
        f"{type(lower).__name__} and {type(upper).__name__} share no backbone: no parameter of their base models "
        f"({type(backbone_of(lower)).__name__} and {type(backbone_of(upper)).__name__}) has the same name and shape. "
        "Use two models on the same backbone."
    )


def report_unshared(lower: PreTrainedModel, upper: PreTrainedModel) -> None:
    """Logs which parameters both backbones have and only one level trains."""
    common = _common_parameters(lower, upper)
    for level, trained in (("lower", (True, False)), ("upper", (False, True))):
        if own := [name for name, pair in common.items() if pair == trained]:
            logger.warning(
                f"Only the {level} model trains {_listed(own)}: {'they are its' if len(own) > 1 else 'it is its'} "
                "own, and no part of the shared backbone."
            )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"{', '.join(names[:6])}{more}"


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(name.startswith(pattern) or fnmatch(name, pattern) for pattern in patterns)
