"""What a recipe knows for the model card."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..cards.facts import LICENSES, ModelFacts, check_license
from ..cards.writing import CARD_NAME
from ..data.naming import hub_repository

logger = logging.getLogger(__name__)


@dataclass
class CardArguments:
    """What only the user knows of the model."""

    license: str | None = field(
        default=None,
        metadata={"help": "Licence of the model, by the Hub's identifier; that of the model it starts from if known."},
    )


def recipe_facts(
    arguments: CardArguments,
    *,
    dataset: str,
    lower_dataset: str | None = None,
    base_models: Sequence[str | None] = (),
    settings: dict[str, Any] | None = None,
) -> ModelFacts:
    """Returns what the card of a recipe's model says beside what the trainer knows.

    Args:
        arguments ([`CardArguments`])
        dataset, lower_dataset (`str`): as the user named them.
        base_models (`Sequence[str | None]`, *optional*): models that training starts from, as the user named them.
        settings (`dict[str, Any]`, *optional*): dataclasses of settings, by the part of the run.

    Raises:
        `ValueError`: if the licence is none that the Hub knows.
    """
    check_license(arguments.license)
    named = [name for name in base_models if name]
    inherited = next(filter(None, map(license_of, named)), None) if arguments.license is None else None
    return ModelFacts(
        dataset=dataset,
        lower_dataset=lower_dataset,
        base_model=[name for name in named if hub_repository(name)],
        license=arguments.license or inherited,
        settings=settings or {},
    )


def license_of(model: str) -> str | None:
    """Returns the licence that the card of a model states, or `None` if it states none or cannot be read.

    Args:
        model (`str`): a folder or a Hub id.
    """
    path = Path(model).expanduser() / CARD_NAME
    if not path.is_file() and not hub_repository(model):
        return None
    try:
        found = ModelCard.load(path if path.is_file() else model, ignore_metadata_errors=True).data.get("license")
    # The Hub's client, the network and YAML each raise errors of their own, and no run should end for a licence.
    except Exception as error:
        logger.info(f"The licence of {model} is not known: {type(error).__name__}: {error}")
        return None
    return found if isinstance(found, str) and found in LICENSES else None
