"""One random view of each image."""

import torch

from bissl_hf.data.augment import TrainTransform
from bissl_hf.data.one_view import OneViewTransform


def test_it_is_a_crop_of_the_papers_ranges_without_labels() -> None:
    images = torch.randint(0, 256, (6, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": images, "labels": torch.arange(6)}
    views = OneViewTransform(16)(inputs, key=(3, 1))
    assert list(views) == ["pixel_values"]
    assert views["pixel_values"].shape == (6, 3, 16, 16)
    same = TrainTransform(16, crop_scale=(0.2, 1.0), crop_ratio=(3 / 4, 4 / 3))(inputs, key=(3, 1))
    assert torch.equal(views["pixel_values"], same["pixel_values"])
    assert not torch.equal(views["pixel_values"], OneViewTransform(16)(inputs, key=(3, 2))["pixel_values"])
    assert "labels" in inputs
