"""What follows from the model that a run starts from: how images are prepared, and which optimizers are usual."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from transformers import PretrainedConfig, TrainingArguments

from ..models.configuration_backbone import backbone_config, resnet18_config
from ..models.image_size import own_preprocessing
from ..optim.presets import PAPER, optimizer_preset
from ..text import for_console
from .images import DataArguments
from .loading import load_config, loading

USUAL_IMAGE_SIZE = 96
_SETTINGS = ("optim", "learning_rate", "weight_decay")

DataType = TypeVar("DataType", bound=DataArguments)
ArgumentsType = TypeVar("ArgumentsType")


@dataclass(frozen=True)
class StartingPoint:
    """The model that a run starts from.

    Args:
        source (`str`, *optional*): folder or Hub id; none for the ResNet-18 with random weights.
        field (`str`): the argument that names it.
        config (`PretrainedConfig`): of its backbone.
    """

    source: str | None
    field: str
    config: PretrainedConfig

    @classmethod
    def find(cls, arguments: Any, *names: str) -> "StartingPoint":
        """Returns the first model that is named. All of them must exist.

        Args:
            arguments: an object with the arguments.
            names (`str`): those that name a model where they are given.

        Raises:
            `ValueError`: see [`loading`].
        """
        named = {name: source for name in names if (source := getattr(arguments, name))}
        configs = {name: load_config(name, source) for name, source in named.items()}
        if not named:
            return cls(None, names[0], resnet18_config())
        first = next(iter(named))
        return cls(named[first], first, backbone_config(configs[first]))

    def complete(self, data: DataType) -> DataType:
        """Returns the arguments of the data with what they leave open of the preprocessing: that of the model's own
        image processor; else the size of its configuration, and ImageNet's mean and deviation.

        Raises:
            `ValueError`: if numbers are not allowed, or the image processor does what the transforms do not.
        """
        found = data.preprocessing
        if self.source is not None:
            with loading(self.field, self.source):
                found = own_preprocessing(self.source, self.config, image_size=data.image_size)
        return data.completed(replace(found, image_size=found.image_size or USUAL_IMAGE_SIZE))

    def with_usual_optimizers(
        self, arguments: ArgumentsType, given: Iterable[str], levels: Mapping[str, str]
    ) -> ArgumentsType:
        """Returns the arguments with the optimizers that are usual for the family of the backbone, where the user has
        not chosen; see [`optimizer_preset`]. Those of networks with batch norm are the defaults of each command.

        Args:
            arguments: a dataclass.
            given (`Iterable[str]`): names of the arguments that the user has set. One who has chosen the optimizer of
                a level gets the defaults of the command for the rest.
            levels (`Mapping[str, str]`): what precedes the names of the fields of an optimizer in the arguments, and
                in the preset.
        """
        given = set(given)
        changes: dict[str, Any] = {}
        preset = optimizer_preset(self.config)
        if preset == PAPER:
            return arguments
        for prefix, source in levels.items():
            if given.isdisjoint({f"{prefix}optim", f"{prefix}optim_args"}):
                names = [name for name in _SETTINGS if f"{prefix}{name}" not in given]
                changes |= {f"{prefix}{name}": preset[f"{source}{name}"] for name in names}
        return replace(arguments, **changes)  # type: ignore[type-var]

    def print_choices(self, data: DataArguments, *arguments: Any, to: TrainingArguments) -> None:
        """Prints, once, how images are prepared, and the optimizers that are usual for the family.

        Args:
            data ([`DataArguments`])
            *arguments: dataclasses with the settings of the optimizers.
            to (`TrainingArguments`): of the process.
        """
        if to.process_index == 0:
            origin = f"those of {self.source}" if self.source else "the usual ones"
            print(for_console(f"Images: {data.preprocessing.describe()}; settings that are not given are {origin}."))
        self.print_optimizers(*arguments, to=to)

    def print_optimizers(self, *arguments: Any, to: TrainingArguments) -> None:
        """Prints, once, the optimizers that are usual for the family; see `print_choices`."""
        if not to.process_index and optimizer_preset(self.config) != PAPER:
            chosen = ", ".join(_optimizer_settings(arguments))
            family = self.config.model_type
            print(for_console(f"Optimizers: {chosen}; settings that are not given are the usual ones of {family}."))


def _optimizer_settings(arguments: Iterable[Any]) -> Iterator[str]:
    for each in arguments:
        for name in (f"{prefix}{setting}" for prefix in ("pretrain_", "lower_", "") for setting in _SETTINGS):
            if hasattr(each, name):
                value = getattr(each, name)
                yield f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
