"""Configuration of the model that holds both levels."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from .auto import is_passed_class, resolve_class
from .configuration_backbone import as_config


class BiSSLConfig(PretrainedConfig):
    """Configuration of [`BiSSLModel`].

    Args:
        lower_config, upper_config (`PretrainedConfig` or `dict`): of the pretext and the downstream model.
        lower_class, upper_class (`str`): their class names, looked up in `transformers` and `bissl_hf`; with the
            module before it (`"mytasks.Rotation"`) that of another class, which the user has passed.
        unshared_parameters (`Sequence[str]`, *optional*, defaults to `("pooler.",)`): patterns of parameters of the
            base models that need not be common to both.
        frozen_parameters (`Sequence[str]`, *optional*, defaults to `()`): names of the parameters that are not
            trained, level first (`"lower.backbone..."`); weights on disk do not say.
        lower_adapter, upper_adapter (`dict`, *optional*): adapter of a level, its `name` and the `config` of `peft`.
    """

    model_type = "bissl"
    sub_configs: ClassVar[dict[str, Any]] = {"lower_config": AutoConfig, "upper_config": AutoConfig}
    has_no_defaults_at_init = True

    lower_config: Any = None
    upper_config: Any = None
    lower_class: str | None = None
    upper_class: str | None = None
    unshared_parameters: Any = ("pooler.",)
    frozen_parameters: Any = ()
    lower_adapter: Any = None
    upper_adapter: Any = None

    def __init__(
        self,
        lower_config: PretrainedConfig | dict[str, Any] | None = None,
        upper_config: PretrainedConfig | dict[str, Any] | None = None,
        lower_class: str | None = None,
        upper_class: str | None = None,
        unshared_parameters: Sequence[str] = ("pooler.",),
        frozen_parameters: Sequence[str] = (),
        lower_adapter: dict[str, Any] | None = None,
        upper_adapter: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # The base class resets the attention of the sub-configurations it finds, so they are set after it.
        super().__init__(**kwargs)
        self.lower_config = _level_config(lower_config, lower_class, "lower_class")
        self.upper_config = _level_config(upper_config, upper_class, "upper_class")
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]
        self.lower_class = lower_class
        self.upper_class = upper_class
        self.unshared_parameters = list(unshared_parameters)
        self.frozen_parameters = list(frozen_parameters)
        self.lower_adapter, self.upper_adapter = lower_adapter, upper_adapter


def _level_config(
    config: PretrainedConfig | dict[str, Any] | None, class_name: str | None, field: str
) -> PretrainedConfig | None:
    """Returns a level's configuration object; that of a class which was passed is of the class's own type."""
    if isinstance(config, dict) and is_passed_class(class_name):
        kind: Any = resolve_class(class_name, field=field).config_class
        return kind.from_dict(config)
    return None if config is None else as_config(config)


AutoConfig.register("bissl", BiSSLConfig)
