"""What image processors say about images, against what they do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers as tf
from transformers import AutoImageProcessor

from bissl_hf import TwoViewTransform
from bissl_hf.data.augment import EvalTransform, TrainTransform, image_processor
from bissl_hf.data.one_view import OneViewTransform
from bissl_hf.data.preprocessing import Preprocessing, load_preprocessing
from bissl_hf.data.resampling import FILTERS, resampling_weights

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
PROCESSORS: dict[str, Any] = {
    "vit": lambda: tf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, resample=2),
    "dinov2": lambda: tf.BitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD, resample=3
    ),
    "scaled to -1 and 1": lambda: tf.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.0] * 3, image_std=[1.0] * 3, rescale_factor=1 / 127.5
    ),
    "not normalised": lambda: tf.ViTImageProcessor(size={"height": 32, "width": 32}, do_normalize=False),
    "not rescaled": lambda: tf.ViTImageProcessor(
        size={"height": 32, "width": 32}, do_rescale=False, image_mean=[120.0] * 3, image_std=[50.0] * 3
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_normalisation_is_what_the_processor_does(name: str, tmp_path: Path) -> None:
    processor = PROCESSORS[name]()
    processor.save_pretrained(tmp_path)
    colours = np.random.default_rng(0).integers(0, 256, (5, 3), dtype=np.uint8)
    for found in (Preprocessing.from_processor(processor), load_preprocessing(str(tmp_path))):
        assert found is not None
        assert found.image_size == 32
        transform = EvalTransform.from_processor(found)
        for colour in colours:  # of one colour, so that resizing does not matter
            image = np.broadcast_to(colour, (36, 36, 3)).copy()
            expected = processor(PIL.Image.fromarray(image), return_tensors="pt")["pixel_values"]
            pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
            views = transform({"pixel_values": pixels}, (0,))["pixel_values"]
            torch.testing.assert_close(views, expected, atol=1e-4, rtol=1e-5)


def test_the_filter_is_taken() -> None:
    found = Preprocessing.from_processor(PROCESSORS["vit"]())
    assert found.resample == PIL.Image.Resampling.BILINEAR
    for kind in (TrainTransform, EvalTransform, TwoViewTransform, OneViewTransform):
        transform = kind.from_processor(found)
        assert (transform.resample, transform.image_size) == (2, 32)
        assert kind.from_processor(found, image_size=16, resample=3).resample == 3


@pytest.mark.parametrize("resample", sorted(FILTERS))
@pytest.mark.parametrize(("length", "size"), [(50, 16), (16, 50), (24, 24), (31, 7)])
def test_filters_are_pillows(resample: int, length: int, size: int) -> None:
    image = np.random.default_rng(0).integers(60, 190, (1, length), dtype=np.uint8)
    weights = resampling_weights(torch.zeros(1), torch.full((1,), float(length)), length, size, resample)[0]
    found = weights @ torch.from_numpy(image[0]).float()
    expected = np.asarray(PIL.Image.fromarray(image).resize((size, 1), PIL.Image.Resampling(resample)))[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=0.51)


def test_the_export_says_the_same(tmp_path: Path) -> None:
    taken = Preprocessing.from_processor(PROCESSORS["vit"]())
    image_processor(32, mean=taken.mean, std=taken.std, resample=taken.resample).save_pretrained(tmp_path)
    assert load_preprocessing(str(tmp_path)) == taken
    assert AutoImageProcessor.from_pretrained(tmp_path).resample == 2


def test_a_model_of_timm_has_it_in_its_configuration(tmp_path: Path) -> None:
    settings = {"input_size": [3, 96, 96], "mean": MEAN, "std": STD, "interpolation": "bilinear"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": settings}))
    assert load_preprocessing(str(tmp_path)) == Preprocessing(tuple(MEAN), tuple(STD), 96, 2)


def test_a_folder_without(tmp_path: Path) -> None:
    assert load_preprocessing(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert load_preprocessing(str(tmp_path)) is None


def test_a_grey_processor_counts_for_all_channels() -> None:
    assert Preprocessing.from_processor({"image_mean": [0.1], "image_std": 0.3, "size": 28}).mean == (0.1,) * 3


REFUSED = [
    ({"do_flip_channel_order": True}, ValueError, "do_flip_channel_order: it feeds blue before red"),
    ({"size": {"height": 32, "width": 64}}, ValueError, r"makes images of \(32, 64\) pixels; .* make squares"),
    (
        {"image_mean": [0.1, 0.2]},
        ValueError,
        r"image_mean of the image processor is .*; it must have 1 or 3",
    ),
    ({"resample": 0}, ValueError, "`resample` is 0; it must be the number of a filter of Pillow: 1 .lanczos., 2"),
    (3, TypeError, "`processor` is a int; it must be an image processor of transformers"),
]


@pytest.mark.parametrize(("processor", "error", "message"), REFUSED)
def test_what_the_transforms_cannot_do_is_refused(processor: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Preprocessing.from_processor(processor)


def test_damaged_files_and_missing_sizes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="names no size of images; give `image_size`"):
        TrainTransform.from_processor({"image_mean": MEAN, "image_std": STD})
    for content, message in (("{", "is no valid JSON"), ("[]", "holds a list; it must hold the settings")):
        (tmp_path / "preprocessor_config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_preprocessing(str(tmp_path))
