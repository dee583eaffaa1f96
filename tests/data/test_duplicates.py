"""Duplicates are images with the same pixels, whatever their file."""

import io
import logging

import numpy as np
import PIL.Image
from datasets import Dataset, Features, Image

from bissl_hf.data.duplicates import drop_duplicates

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), dtype=np.uint8)


def split_of(images: list, image_format: str = "PNG") -> Dataset:
    values = []
    for pixels in images:
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, image_format)
        values.append({"bytes": buffer.getvalue(), "path": None})
    return Dataset.from_dict({"image": values}, features=Features({"image": Image()}))


def pixels_of(split: Dataset) -> list:
    return [np.asarray(image).tolist() for image in split["image"]]


def test_images_with_the_same_pixels_are_dropped_whatever_their_format(caplog):
    almost = PIXELS[0].copy()
    almost[0, 0, 0] ^= 1
    split = split_of([PIXELS[1], almost, PIXELS[2], PIXELS[3], PIXELS[2]])
    with caplog.at_level(logging.INFO):
        left = drop_duplicates(split, split_of([PIXELS[0], PIXELS[2], PIXELS[5]], "BMP"))
    assert pixels_of(left) == [PIXELS[1].tolist(), almost.tolist(), PIXELS[3].tolist()]
    assert "2 of 5 images are exact duplicates and left out" in caplog.text


def test_the_same_bytes_in_another_shape_are_another_image():
    turned = split_of([PIXELS[0].reshape(4, 5, 3)])
    assert len(drop_duplicates(turned, split_of([PIXELS[0]]))) == 1


def test_grey_and_colour_images_are_compared_as_rgb():
    grey = np.arange(20, dtype=np.uint8).reshape(5, 4)
    assert len(drop_duplicates(split_of([grey, PIXELS[0]]), split_of([np.stack([grey] * 3, axis=-1)]))) == 1


def test_a_split_without_duplicates_stays_as_it_is():
    split = split_of([PIXELS[0]])
    assert drop_duplicates(split, split_of([PIXELS[1]])) is split
