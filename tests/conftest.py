"""Tiny models and data for all tests."""

import gc
import os
from pathlib import Path

# Set before anything of Hugging Face is imported: no test may reach for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny, and two test processes share two cores

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from bissl_hf import BiSSLModel, SimCLRConfig, SimCLRForPreTraining

NUM_LABELS = 3


def tiny_resnet_config() -> ResNetConfig:
    return ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=NUM_LABELS
    )


def tiny_model(seed: int = 0) -> BiSSLModel:
    torch.manual_seed(seed)
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=tiny_resnet_config(), projection_dims=(6, 5)))
    return BiSSLModel.from_models(lower, ResNetForImageClassification(tiny_resnet_config()))


def vit_model(*, projection_dims: tuple[int, ...] = (6, 5), dropout: float = 0.1) -> BiSSLModel:
    """A pair on layer norm. Its checkpoints hold other names than the model: transformers keeps those of older
    releases in files."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, num_labels=NUM_LABELS, hidden_dropout_prob=dropout,
    )  # fmt: skip
    lower = SimCLRForPreTraining(SimCLRConfig(backbone_config=config, projection_dims=projection_dims))
    return BiSSLModel.from_models(lower, ViTForImageClassification(config))


class TinyImages(torch.utils.data.Dataset):
    """Random images, with labels or as pairs of views."""

    def __init__(self, rows: int, *, pairs: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed + rows)
        shape = (rows, 2, 1, 8, 8) if pairs else (rows, 1, 8, 8)
        self.images = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        self.labels = None if pairs else torch.randint(0, NUM_LABELS, (rows,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        row = {"pixel_values": self.images[index]}
        return row if self.labels is None else {**row, "labels": int(self.labels[index])}


def flip_a_bit(path: Path, at: float = 0.5) -> None:
    """Damages a file as a disk does: one bit at a place between its first byte (0) and its last (1)."""
    content = bytearray(path.read_bytes())
    content[round(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def pytest_collection_finish() -> None:
    """Leaves what the imports have made out of all later collections of garbage. Every training ends with one, which
    would take longer than the training of a tiny model."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def model() -> BiSSLModel:
    return tiny_model()
