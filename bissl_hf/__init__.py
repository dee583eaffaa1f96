"""Bilevel self-supervised learning (BiSSL, arXiv 2410.02387) on top of Hugging Face transformers.

Public names are imported on first use, so that `import bissl_hf` stays cheap.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "BYOLConfig": "bissl_hf.models.configuration_byol",
    "BYOLForPreTraining": "bissl_hf.models.modeling_byol",
    "BarlowTwinsConfig": "bissl_hf.models.configuration_barlow_twins",
    "BarlowTwinsForPreTraining": "bissl_hf.models.modeling_barlow_twins",
    "BiSSLConfig": "bissl_hf.models.configuration_bissl",
    "BiSSLModel": "bissl_hf.models.modeling_bissl",
    "BiSSLTrainer": "bissl_hf.trainer.bissl_trainer",
    "BiSSLTrainingArguments": "bissl_hf.trainer.training_args",
    "DecodedImages": "bissl_hf.data.decoded",
    "EvalTransform": "bissl_hf.data.augment",
    "FineTuneTrainer": "bissl_hf.trainer.finetune_trainer",
    "FineTuningArguments": "bissl_hf.trainer.training_args",
    "ImageTask": "bissl_hf.tasks.image_task",
    "JointTrainer": "bissl_hf.trainer.joint_trainer",
    "JointTrainingArguments": "bissl_hf.trainer.training_args",
    "PretextTrainer": "bissl_hf.trainer.pretext_trainer",
    "PretextTrainingArguments": "bissl_hf.trainer.training_args",
    "SimCLRConfig": "bissl_hf.models.configuration_simclr",
    "SimCLRForPreTraining": "bissl_hf.models.modeling_simclr",
    "TrainTransform": "bissl_hf.data.augment",
    "TwoViewTransform": "bissl_hf.data.augment",
    "VICRegConfig": "bissl_hf.models.configuration_vicreg",
    "VICRegForPreTraining": "bissl_hf.models.modeling_vicreg",
    "load_image_dataset": "bissl_hf.data.sources",
    "load_image_task": "bissl_hf.tasks.image_task",
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
    "DecodedImages",
    "EvalTransform",
    "FineTuneTrainer",
    "FineTuningArguments",
    "ImageTask",
    "JointTrainer",
    "JointTrainingArguments",
    "PretextTrainer",
    "PretextTrainingArguments",
    "SimCLRConfig",
    "SimCLRForPreTraining",
    "TrainTransform",
    "TwoViewTransform",
    "VICRegConfig",
    "VICRegForPreTraining",
    "load_image_dataset",
    "load_image_task",
]

if TYPE_CHECKING:
    __version__: str
    from .data.augment import EvalTransform, TrainTransform, TwoViewTransform
    from .data.decoded import DecodedImages
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
    from .tasks.image_task import ImageTask, load_image_task
    from .trainer.bissl_trainer import BiSSLTrainer
    from .trainer.finetune_trainer import FineTuneTrainer
    from .trainer.joint_trainer import JointTrainer
    from .trainer.pretext_trainer import PretextTrainer
    from .trainer.training_args import (
        BiSSLTrainingArguments,
        FineTuningArguments,
        JointTrainingArguments,
        PretextTrainingArguments,
    )


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("bissl_hf")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'bissl_hf' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
