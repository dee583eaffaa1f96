"""What a card says and a trainer cannot know."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .tables import Evaluation

# The identifiers that the Hub accepts, as of May 2026 (https://huggingface.co/docs/hub/repositories-licenses).
# fmt: off
LICENSES = frozenset({
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
    "odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib",
    "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3",
    "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown", "other",
})
# fmt: on


@dataclass
class ModelFacts:
    """What a card should say and a trainer cannot know. A field that is not given is left out of the card.

    Args:
        dataset (`str`, *optional*): the labelled data, or those of pre-training: a Hub id, a short name, a file, a
            folder (the card will not say where), or a title.
        lower_dataset (`str`, *optional*): the unlabelled data of the lower level, likewise.
        base_model (`str` or `list[str]`, *optional*): what training started from. Only Hub ids are named.
        license (`str`, *optional*): an identifier that the Hub knows.
        language (`str`, *optional*): of the training data, by its code.
        tags (`list[str]`, *optional*): in addition to ours.
        task (`str`, *optional*): name of the pipeline that runs the model; found by its class if not given.
        dataset_config (`str`, *optional*): configuration of the labelled data set on the Hub.
        evaluations (`list[Evaluation]`, *optional*): beside those on `eval_dataset`, which the trainer has logged.
        settings (`dict[str, Any]`, *optional*): further dataclasses of settings, by the part of the run.
    """

    dataset: str | None = None
    lower_dataset: str | None = None
    base_model: str | list[str] | None = None
    license: str | None = None
    language: str | None = None
    tags: list[str] = field(default_factory=list)
    task: str | None = None
    dataset_config: str | None = None
    evaluations: list[Evaluation] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def with_card_arguments(
        self,
        language: str | None,
        license: str | None,
        tags: str | Sequence[str] | None,
        base_model: str | None,
        tasks: str | Sequence[str] | None,
        datasets: str | Sequence[str] | None,
        dataset_configs: str | Sequence[str] | None,
    ) -> "ModelFacts":
        """Returns these facts with those in their place that the arguments of `Trainer.create_model_card` give."""
        named = [*as_list(datasets), None, None]
        given: dict[str, Any] = {
            "language": language,
            "license": license,
            "tags": [*self.tags, *as_list(tags)],
            "base_model": base_model,
            "task": next(iter(as_list(tasks)), None),
            "dataset": named[0],
            "lower_dataset": named[1],
            "dataset_config": next(iter(as_list(dataset_configs)), None),
        }
        return replace(self, **{name: value for name, value in given.items() if value})


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """Returns one name, several or none as a list."""
    return [value] if isinstance(value, str) else list(value or [])


def check_license(license: str | None) -> None:
    """Refuses a licence that the Hub would refuse with the whole upload.

    Raises:
        `ValueError`: if there is no such identifier.
    """
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"license is {license!r}; it must be an identifier that the Hub knows, such as apache-2.0, mit, cc-by-4.0 "
            "or other: see https://huggingface.co/docs/hub/repositories-licenses."
        )
