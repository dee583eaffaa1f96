"""Samples of views."""

import numpy as np
import pytest
import torch
from PIL import Image

from bissl_hf import TwoViewTransform
from bissl_hf.cli.views import sample_views, write_preview
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.data.one_view import OneViewTransform

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 3, 12, 12)).astype(np.uint8)
PLAIN = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0, "color_jitter": 0.0,
         "grayscale": 0.0, "blur": (0.0, 0.0), "solarize": (0.0, 0.0)}  # fmt: skip


def test_views_that_change_nothing_are_the_images_from_all_over_the_data_set():
    samples = sample_views(DecodedImages(PIXELS), TwoViewTransform(12, **PLAIN))
    assert len(samples) == 8
    for sample, row in zip(samples, (0, 2, 5, 8, 10, 13, 16, 19), strict=True):
        assert [image.dtype for image in sample] == [np.uint8] * 3
        assert (sample[0] == PIXELS[row]).all()
        for view in sample[1:]:
            assert np.abs(view.astype(int) - PIXELS[row]).max() <= 1


def test_masked_images_have_one_view():
    samples = sample_views(DecodedImages(PIXELS), OneViewTransform(12))
    assert {len(sample) for sample in samples} == {2}


def test_a_small_data_set_gives_what_it_has():
    assert len(sample_views(DecodedImages(PIXELS[:3]), TwoViewTransform(12))) == 3


def test_denormalize_undoes_normalize():
    transform = TwoViewTransform(12)
    images = torch.from_numpy(PIXELS)
    assert (transform.denormalize(transform.normalize(images / 255)) == images).all()


@pytest.mark.parametrize("folder", ["runs/one", "runs/one/"])
def test_the_preview_is_beside_the_output_folder(folder, tmp_path, capsys):
    write_preview(DecodedImages(PIXELS), TwoViewTransform(12), f"{tmp_path}/{folder}", seed=1)
    path = tmp_path / "runs" / "one_views.png"
    assert str(path) in capsys.readouterr().out
    assert not (tmp_path / "runs" / "one").exists()
    with Image.open(path) as image:
        assert image.width > 1000
