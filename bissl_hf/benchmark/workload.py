"""What a benchmark works on: images, a pair of models and a trainer, in sizes that fit a machine."""

import atexit
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PrinterCallback, ResNetConfig, ResNetForImageClassification

from ..data.augment import EvalTransform, TrainTransform, TwoViewTransform
from ..data.decoded import DecodedImages
from ..models.configuration_backbone import resnet18_config
from ..models.configuration_simclr import SimCLRConfig
from ..models.modeling_bissl import BiSSLModel
from ..models.modeling_simclr import SimCLRForPreTraining
from ..trainer.bissl_trainer import BiSSLTrainer
from ..trainer.pretext_trainer import PretextTrainer
from ..trainer.training_args import BiSSLTrainingArguments, PretextTrainingArguments

NUM_CLASSES = 10
SMALL_RATE = 1e-4
# A damping at which no solve ends early, of negative curvature or because it is done: all do the same arithmetic.
DEFINITE = 1e6


@dataclass(frozen=True)
class Workload:
    """Sizes of a benchmark.

    Args:
        name (`str`): what they are made for.
        image_size (`int`): side of the views, in pixels.
        lower_batch, upper_batch (`int`): images per step.
        lower_steps, upper_steps, products (`int`): per alternation, and per upper step at most.
        pretrain_steps, pretrain_batch (`int`): SimCLR steps before anything is measured, and their pairs.
        repeats (`int`): rounds that a median is taken of.
        evaluation_images (`int`): images of one evaluation.
        width (`int`): channels of the first layer: 64 is ResNet-18.
        workers (`int`): processes that read images.
        bf16 (`bool`): whether our side computes in bfloat16 and channels-last.
        damping (`float`): delta of the solves that stop at a tolerance, raised where it leaves a system indefinite.
    """

    name: str
    image_size: int
    lower_batch: int
    upper_batch: int
    lower_steps: int
    upper_steps: int
    products: int = 5
    pretrain_steps: int = 0
    pretrain_batch: int = 32
    repeats: int = 5
    evaluation_images: int = 64
    width: int = 64
    workers: int = 0
    bf16: bool = False
    damping: float = 10.0

    def changed(self, **changes: Any) -> "Workload":
        """Returns a copy with other sizes."""
        return replace(self, **changes)


# The paper's sizes (section 4) on a GPU; on a CPU what fits the time, with the paper's proportions of both batches.
# With fewer pairs, arithmetic on the weights, which no count of equivalents holds, is no longer small beside theirs.
WORKLOADS = {
    "quick": Workload("quick", 32, 24, 12, lower_steps=2, upper_steps=3, pretrain_steps=40, width=32),
    "cpu": Workload("cpu", 32, 24, 12, lower_steps=3, upper_steps=8, pretrain_steps=400),
    "gpu": Workload(
        "gpu",
        96,
        1024,
        256,
        20,
        8,
        pretrain_steps=300,
        pretrain_batch=1024,
        evaluation_images=8192,
        workers=8,
        bf16=True,
    ),
}


def benchmark_backbone(width: int) -> ResNetConfig:
    """Returns ResNet-18, or the same network with another width."""
    if width == 64:
        return resnet18_config()
    sizes = [width, 2 * width, 4 * width, 8 * width]
    return ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[2, 2, 2, 2], layer_type="basic")


def benchmark_images(rows: int, image_size: int, *, seed: int = 0) -> DecodedImages:
    """Returns labelled images: scikit-learn's handwritten digits, tinted and enlarged to `image_size`, repeated to as
    many rows as asked for."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = np.random.default_rng(seed).permutation(len(digits.images))
    chosen = np.resize(chosen, min(rows, len(chosen)))
    generator = torch.Generator().manual_seed(seed)
    tints = torch.rand(len(chosen), 3, 1, 1, generator=generator)
    images = torch.from_numpy(digits.images[chosen]).float()[:, None] / 16
    images = F.interpolate(images, size=(image_size, image_size), mode="bilinear") * (0.5 + 0.5 * tints)
    pixels = (255 * images).to(torch.uint8).numpy()
    labels = digits.target[chosen].astype(np.int64)
    repeats = -(-rows // len(chosen))
    return DecodedImages(np.tile(pixels, (repeats, 1, 1, 1))[:rows], np.tile(labels, repeats)[:rows])


def build_model(workload: Workload) -> BiSSLModel:
    """Returns a SimCLR and a classification model with random weights."""
    backbone = benchmark_backbone(workload.width)
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=backbone))
    config = ResNetConfig.from_dict(backbone.to_dict())
    config.id2label = {number: str(number) for number in range(NUM_CLASSES)}
    upper = ResNetForImageClassification(config)
    return BiSSLModel.from_models(lower, upper)


@cache
def own_folder() -> str:
    """Returns the output folder of all trainers of this process, which is removed at its end: a folder that it shared
    with another benchmark would be in use by that one."""
    folder = tempfile.mkdtemp(prefix="bissl_hf-benchmark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def build_trainer(workload: Workload, model: BiSSLModel, device: torch.device, **changes: Any) -> BiSSLTrainer:
    """Returns a trainer on these sizes, whose folder is the one of [`own_folder`].

    Args:
        workload ([`Workload`])
        model ([`BiSSLModel`])
        device (`torch.device`): a CPU or the first GPU.
        **changes: fields of [`BiSSLTrainingArguments`].
    """
    rows = max(4 * workload.lower_batch, 2048)
    size = workload.image_size
    settings: dict[str, Any] = {
        "output_dir": own_folder(),
        "num_alternations": 1,
        "lower_steps": workload.lower_steps,
        "upper_steps": workload.upper_steps,
        "solver_max_iterations": workload.products,
        "proximal_weight": 0.001,
        "damping": DEFINITE,
        "lower_learning_rate": SMALL_RATE,  # weights stay what they are, however long is measured
        "learning_rate": SMALL_RATE,
        "per_device_lower_batch_size": workload.lower_batch,
        "per_device_train_batch_size": workload.upper_batch,
        "per_device_eval_batch_size": min(workload.upper_batch * 4, 1024),
        "bn_recalibration_images": 0,
        "head_warmup_epochs": 0,
        "dataloader_num_workers": workload.workers,
        "bf16": workload.bf16,
        "use_cpu": device.type == "cpu",
        "save_strategy": "no",
        "eval_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    trainer = BiSSLTrainer(
        model,
        BiSSLTrainingArguments(**{**settings, **changes}),
        train_dataset=benchmark_images(rows, size, seed=1),
        lower_dataset=benchmark_images(rows, size, seed=2),
        eval_dataset=benchmark_images(workload.evaluation_images, size * 256 // 224, seed=3),
        train_transform=TrainTransform(size),
        eval_transform=EvalTransform(size),
        lower_transform=TwoViewTransform(size),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def pretrain(model: BiSSLModel, workload: Workload, device: torch.device) -> None:
    """Trains the lower model with SimCLR for as many steps as the workload says, and starts the upper one from it."""
    if workload.pretrain_steps:
        trainer = PretextTrainer(
            model.lower,
            PretextTrainingArguments(
                output_dir=own_folder(),
                max_steps=workload.pretrain_steps,
                per_device_train_batch_size=workload.pretrain_batch,
                learning_rate=1.0,
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                report_to="none",
                bf16=workload.bf16,
                use_cpu=device.type == "cpu",
            ),
            train_dataset=benchmark_images(max(4 * workload.lower_batch, 2048), workload.image_size, seed=2),
            train_transform=TwoViewTransform(workload.image_size),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.start_upper_from_lower()
