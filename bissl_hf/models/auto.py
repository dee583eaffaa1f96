"""Which model classes a checkpoint may name: those of transformers, and the pretext models of this package.

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


def pretext_class(model_type: str) -> type[PreTrainedModel]:
    """Returns the class of a pretext model by its model type, such as `"simclr"`."""
    found: type[PreTrainedModel] = getattr(
        import_module(f"{__package__}.modeling_{model_type}"), PRETEXT_MODELS[model_type]
    )
    return found


def resolve_class(name: str | None) -> type[PreTrainedModel]:
    """Returns the model class of this name in `transformers` or `bissl_hf`; nowhere else is looked.

    Raises:
        `ValueError`: if there is none.
    """
    for model_type, class_name in PRETEXT_MODELS.items():
        if name == class_name:
            return pretext_class(model_type)
    found = getattr(transformers, name, None) if name else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    raise ValueError(f"{name!r} is no model class of transformers or bissl_hf; the classes of both levels must be.")
