"""Bilevel self-supervised learning (BiSSL, arXiv 2410.02387) on top of Hugging Face transformers.

Public names are imported on first use, so that `import bissl_hf` stays cheap.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "BiSSLConfig": "bissl_hf.models.configuration_bissl",
    "BiSSLModel": "bissl_hf.models.modeling_bissl",
    "BiSSLTrainer": "bissl_hf.trainer.bissl_trainer",
    "BiSSLTrainingArguments": "bissl_hf.trainer.training_args",
    "BYOLConfig": "bissl_hf.models.configuration_byol",
    "BYOLForPreTraining": "bissl_hf.models.modeling_byol",
    "VICRegConfig": "bissl_hf.models.configuration_vicreg",
    "VICRegForPreTraining": "bissl_hf.models.modeling_vicreg",
    "BarlowTwinsConfig": "bissl_hf.models.configuration_barlow_twins",
    "BarlowTwinsForPreTraining": "bissl_hf.models.modeling_barlow_twins",
    "SimCLRConfig": "bissl_hf.models.configuration_simclr",
    "SimCLRForPreTraining": "bissl_hf.models.modeling_simclr",
    "TwoViewTransform": "bissl_hf.data.augment",
    "load_image_dataset": "bissl_hf.data.sources",
}

__all__ = [
    "BYOLConfig",
    "BYOLForPreTraining",
    "BarlowTwinsConfig",
    "BarlowTwinsForPreTraining",
    "BiSSLConfig",
    "BiSSLModel",
    "BiSSLTrainer",
    "BiSSLTrainingArguments",
    "SimCLRConfig",
    "SimCLRForPreTraining",
    "TwoViewTransform",
    "VICRegConfig",
    "VICRegForPreTraining",
    "load_image_dataset",
]

if TYPE_CHECKING:
    __version__: str
    from .data.augment import TwoViewTransform
    from .data.sources import load_image_dataset
    from .models.configuration_barlow_twins import BarlowTwinsConfig
    from .models.configuration_bissl import BiSSLConfig
    from .models.configuration_byol import BYOLConfig
    from .models.configuration_simclr import SimCLRConfig
    from .models.configuration_vicreg import VICRegConfig
    from .models.modeling_barlow_twins import BarlowTwinsForPreTraining
    from .models.modeling_bissl import BiSSLModel
    from .models.modeling_byol import BYOLForPreTraining
    from .models.modeling_simclr import SimCLRForPreTraining
    from .models.modeling_vicreg import VICRegForPreTraining
    from .trainer.bissl_trainer import BiSSLTrainer
    from .trainer.training_args import BiSSLTrainingArguments


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("bissl_hf")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'bissl_hf' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
