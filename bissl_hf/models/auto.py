"""Which model classes a checkpoint may name: those of transformers, those of this package, and those that the user has
passed. A name in a checkpoint never has anything imported beside the first two.

A new pretext task adds one line here.
"""

from importlib import import_module

import transformers
from transformers import PreTrainedModel

# Model type -> class name; the class is in modeling_TYPE.py, its configuration in configuration_TYPE.py.
PRETEXT_MODELS = {
    "simclr": "SimCLRForPreTraining",
    "byol": "BYOLForPreTraining",
    "vicreg": "VICRegForPreTraining",
    "barlow_twins": "BarlowTwinsForPreTraining",
}

# Class name -> module, of the other models of this package.
_OTHER_MODELS = {
    "DINOv3ViTForImageClassification": "modeling_dinov3",
    "DINOv3ConvNextForImageClassification": "modeling_dinov3",
}

# Classes that the user has passed, by module and name: "mytasks.Rotation".
_passed_classes: dict[str, type[PreTrainedModel]] = {}


def pretext_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the class of a pretext model by its model type, such as `"simclr"`."""
    found: type[PreTrainedModel] = getattr(
        import_module(f"{__package__}.modeling_{model_type}"), PRETEXT_MODELS[model_type]
    )
    return found


def _known_class(name: str) -> type[PreTrainedModel] | None:
    """Returns the class of this name in transformers or this package."""
    for model_type, pretext_name in PRETEXT_MODELS.items():
        if name == pretext_name:
            return pretext_class(model_type)
    found = getattr(transformers, name, None)
    if found is None and name in _OTHER_MODELS:
        found = getattr(import_module(f"{__package__}.{_OTHER_MODELS[name]}"), name)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def register_class(model_class: type[PreTrainedModel]) -> str:
    """Has a model class found by the name that it gets in checkpoints, and returns that name: the plain one for
    classes of transformers and bissl_hf, else with the module, `"mytasks.Rotation"`.

    Raises:
        `TypeError`: for anything but a class of models.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise TypeError(f"{model_class!r} is no model class; it must be a subclass of transformers' PreTrainedModel.")
    if _known_class(model_class.__name__) is model_class:
        return model_class.__name__
    name = f"{model_class.__module__}.{model_class.__qualname__}"
    _passed_classes[name] = model_class
    return name


def is_passed_class(name: str | None) -> bool:
    """Whether a name is that of a class which is neither of transformers nor of bissl_hf."""
    return name is not None and "." in name


def resolve_class(name: str | None, *, field: str = "lower_class") -> type[PreTrainedModel]:
    """Returns the model class of this name: one of `transformers` or `bissl_hf`, or one that was passed.

    Args:
        name (`str`, *optional*): as `register_class` returns it.
        field (`str`, *optional*, defaults to `"lower_class"`): which field has the name, for messages.

    Raises:
        `ValueError`: if there is none.
    """
    if name in _passed_classes:
        return _passed_classes[name]
    found = _known_class(name) if name else None
    if found is not None:
        return found
    if is_passed_class(name):
        short = str(name).rpartition(".")[2]
        raise ValueError(
            f"{field} is {name!r}, a class that is neither of transformers nor of bissl_hf, and nothing is imported "
            f"because a checkpoint names it; pass the class itself: BiSSLModel.from_pretrained(..., {field}={short})."
        )
    raise ValueError(f"{field} is {name!r}, which is no model class of transformers or bissl_hf.")
