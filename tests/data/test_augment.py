import json
import random
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import Dataset, Features, Image
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification, pipeline

from bissl_hf.data.augment import EvalTransform, TrainTransform, TwoViewTransform, image_processor
from bissl_hf.data.decoded import DecodedImages
from bissl_hf.data.resampling import resampling_weights

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PLAIN = {"color_jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0), "solarize": (0.0, 0.0)}


def smooth_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Images with structure: coarse noise, enlarged."""
    generator = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
    return torch.stack(images)


def to_pil(image: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(image.permute(1, 2, 0).numpy())


def levels(normalized: torch.Tensor) -> torch.Tensor:
    """Undoes the normalisation: values in [0, 255]."""
    return (normalized * STD + MEAN) * 255


ALL = [TwoViewTransform(16), TrainTransform(16), EvalTransform(16)]
RANDOM = [TwoViewTransform(16), TrainTransform(16)]


def name_of(transform: object) -> str:
    return type(transform).__name__


class TestKey:
    @pytest.mark.parametrize("transform", ALL, ids=name_of)
    def test_same_key_same_pixels(self, transform):
        inputs = {"pixel_values": smooth_images(4, 20, 20)}
        first = transform(inputs, (0, 1, 2))["pixel_values"]
        # What was drawn in between does not matter.
        transform(inputs, (5,))
        torch.rand(3)
        assert torch.equal(first, transform(inputs, (0, 1, 2))["pixel_values"])
        assert torch.equal(first, type(transform)(16)(inputs, (0, 1, 2))["pixel_values"])

    @pytest.mark.parametrize("transform", RANDOM, ids=name_of)
    def test_other_key_other_pixels(self, transform):
        inputs = {"pixel_values": smooth_images(4, 20, 20)}
        first, second = (transform(inputs, key)["pixel_values"] for key in ((0, 1), (1, 0)))
        assert all(not torch.allclose(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("transform", ALL, ids=name_of)
    def test_global_random_states_stay(self, transform):
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        expected = torch.rand(4), np.random.rand(4), random.random()
        torch.manual_seed(0), np.random.seed(0), random.seed(0)
        transform({"pixel_values": smooth_images(4, 20, 20)}, (0,))
        assert torch.equal(torch.rand(4), expected[0])
        np.testing.assert_array_equal(np.random.rand(4), expected[1])
        assert random.random() == expected[2]

    @pytest.mark.parametrize("transform", ALL, ids=name_of)
    def test_inputs_are_not_changed(self, transform):
        inputs = {"pixel_values": smooth_images(2, 20, 20), "labels": torch.tensor([0, 1])}
        before = inputs["pixel_values"].clone()
        transform(inputs, (0,))
        assert set(inputs) == {"pixel_values", "labels"}
        assert torch.equal(inputs["pixel_values"], before)


class TestOutputs:
    def test_two_views(self):
        inputs = {"pixel_values": smooth_images(4, 20, 20), "labels": torch.zeros(4)}
        outputs = TwoViewTransform(16)(inputs, (0,))
        assert set(outputs) == {"pixel_values"}
        assert outputs["pixel_values"].shape == (4, 2, 3, 16, 16)
        assert outputs["pixel_values"].dtype == torch.float32
        assert all(not torch.allclose(views[0], views[1]) for views in outputs["pixel_values"])

    @pytest.mark.parametrize("transform", [TrainTransform(16), EvalTransform(16)], ids=name_of)
    def test_labels_are_kept(self, transform):
        labels = torch.tensor([3, 1])
        outputs = transform({"pixel_values": smooth_images(2, 20, 24), "labels": labels}, (0,))
        assert outputs["labels"] is labels
        assert outputs["pixel_values"].shape == (2, 3, 16, 16)
        assert outputs["pixel_values"].dtype == torch.float32

    @pytest.mark.parametrize("transform", RANDOM, ids=name_of)
    def test_values_stay_in_range(self, transform):
        noise = torch.randint(0, 256, (8, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        values = levels(transform({"pixel_values": noise}, (0,))["pixel_values"])
        assert values.min() > -1e-2
        assert values.max() < 255 + 1e-2

    def test_full_precision_under_autocast(self):
        inputs = {"pixel_values": smooth_images(2, 20, 20)}
        expected = TrainTransform(16)(inputs, (0,))["pixel_values"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = TrainTransform(16)(inputs, (0,))["pixel_values"]
        assert torch.equal(found, expected)

    @pytest.mark.gpu
    @pytest.mark.parametrize("transform", ALL, ids=name_of)
    def test_same_views_on_an_accelerator(self, transform):
        inputs = {"pixel_values": smooth_images(4, 20, 20)}
        expected = transform(inputs, (0, 1))["pixel_values"]
        found = transform({"pixel_values": inputs["pixel_values"].cuda()}, (0, 1))["pixel_values"]
        torch.testing.assert_close(found.cpu(), expected, atol=0.02, rtol=0)


class TestCrop:
    @pytest.mark.parametrize(
        ("start", "stop", "size"), [(0, 24, 24), (3, 13, 24), (0, 50, 16), (7, 48, 16), (9, 10, 8)]
    )
    def test_is_pillows_bicubic_of_the_crop(self, start, stop, size):
        image = smooth_images(1, 50, 50)[0]
        box = torch.tensor([float(start)]), torch.tensor([float(stop)])
        weights = resampling_weights(*box, 50, size)[0]
        found = (weights @ image.float() @ weights.T).clamp(0, 255)
        expected = to_pil(image).crop((start, start, stop, stop)).resize((size, size), PIL.Image.Resampling.BICUBIC)
        # Pillow rounds to whole levels after each of its two passes, and the second enlarges the error of the first by
        # its sum of absolute weights, which is below 1.5.
        difference = found - torch.from_numpy(np.asarray(expected).copy()).permute(2, 0, 1)
        assert difference.abs().max() <= 1.25
        assert difference.abs().mean() < 0.4

    def test_whole_image_is_unchanged(self):
        images = smooth_images(3, 16, 16)
        transform = TrainTransform(16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.0)
        torch.testing.assert_close(
            transform({"pixel_values": images}, (0,))["pixel_values"], (images / 255 - MEAN) / STD, atol=1e-5, rtol=0
        )

    def test_plain_two_views_are_the_normalised_images(self):
        images = smooth_images(3, 16, 16)
        transform = TwoViewTransform(16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.0, **PLAIN)
        views = transform({"pixel_values": images}, (0,))["pixel_values"]
        expected = ((images / 255 - MEAN) / STD)[:, None].expand(-1, 2, -1, -1, -1)
        torch.testing.assert_close(views, expected, atol=1e-5, rtol=0)

    def test_flip_probability(self):
        images = smooth_images(1, 16, 16).expand(400, -1, -1, -1)
        transform = TrainTransform(16, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), horizontal_flip=0.25)
        found = transform({"pixel_values": images}, (0,))["pixel_values"]
        straight = (images / 255 - MEAN) / STD
        flipped = (found - straight.flip(-1)).abs().amax((1, 2, 3)) < 1e-4
        kept = (found - straight).abs().amax((1, 2, 3)) < 1e-4
        assert bool((flipped ^ kept).all())
        assert 0.15 < flipped.float().mean() < 0.35

    def test_scale_and_ratio_of_the_boxes(self):
        """The red channel holds the column and green the row, so that a crop's size can be read from its slope."""
        side, size = 200, 20
        ramp = torch.arange(side, dtype=torch.uint8)
        image = torch.stack([ramp.expand(side, side), ramp[:, None].expand(side, side), torch.zeros(side, side)])
        transform = TrainTransform(size, crop_scale=(0.1, 0.3), crop_ratio=(0.5, 1.0), horizontal_flip=0.0)
        batch = {"pixel_values": image.to(torch.uint8).expand(300, -1, -1, -1)}
        crops = levels(transform(batch, (0,))["pixel_values"])
        # Away from the borders the values are linear with slope (side of the box) / size.
        width = (crops[:, 0, 10, 14] - crops[:, 0, 10, 6]) / 8 * size
        height = (crops[:, 1, 14, 10] - crops[:, 1, 6, 10]) / 8 * size
        area, ratio = width * height / side**2, width / height
        assert area.min() > 0.095
        assert area.max() < 0.305
        assert 0.19 < area.mean() < 0.21
        assert ratio.min() > 0.48
        assert ratio.max() < 1.02
        # Log-uniform: the geometric mean of 0.5 and 1.
        assert abs(ratio.log().mean().exp() - 0.5**0.5) < 0.02


class TestColours:
    """Each operation alone, with a crop that keeps the whole image."""

    def views(self, images: torch.Tensor, **operations: object) -> torch.Tensor:
        whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "horizontal_flip": 0.0}
        transform = TwoViewTransform(images.shape[-1], **whole, **(PLAIN | operations))
        return levels(transform({"pixel_values": images}, (0,))["pixel_values"])

    def test_grayscale(self):
        images = smooth_images(4, 16, 16)
        gray = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True).expand(-1, 3, -1, -1)
        found = self.views(images, grayscale=1.0)
        torch.testing.assert_close(found[:, 0], gray, atol=0.1, rtol=0)
        torch.testing.assert_close(found[:, 1], gray, atol=0.1, rtol=0)

    def test_solarize_in_the_second_view_only(self):
        images = smooth_images(4, 16, 16)
        found = self.views(images, solarize=(0.0, 1.0))
        expected = torch.where(images >= 128, 255 - images, images).float()
        torch.testing.assert_close(found[:, 0], images.float(), atol=0.01, rtol=0)
        torch.testing.assert_close(found[:, 1], expected, atol=0.01, rtol=0)

    def test_blur_in_the_first_view_only(self):
        images = smooth_images(8, 32, 32)
        found = self.views(images, blur=(1.0, 0.0))
        torch.testing.assert_close(found[:, 1], images.float(), atol=0.01, rtol=0)
        roughness = [view.diff(dim=-1).square().mean((1, 2, 3)) for view in (found[:, 0], images.float())]
        assert bool((roughness[0] < roughness[1] + 1e-3).all())
        assert roughness[0].mean() < 0.97 * roughness[1].mean()
        # A blur is a weighted mean: it moves no brightness.
        torch.testing.assert_close(found[:, 0].mean((2, 3)), images.float().mean((2, 3)), atol=4, rtol=0)

    def test_jitter_changes_what_its_probability_says(self):
        images = smooth_images(1, 16, 16).expand(300, -1, -1, -1)
        found = self.views(images, color_jitter=0.8)[:, 0]
        changed = (found - images).abs().amax((1, 2, 3)) > 0.5
        assert 0.72 < changed.float().mean() < 0.88
        means = found[changed].mean((1, 2, 3)) / images[0].float().mean()
        # Brightness is multiplied by 0.6 to 1.4; clipping and contrast move the mean a little further.
        assert 0.5 < means.min() < 0.75
        assert 1.2 < means.max() < 1.5

    def test_operations_of_probability_0_are_not_built(self):
        plain = TwoViewTransform(16, **PLAIN)
        assert [len(operations) for operations in plain._operations] == [1, 1]  # the crop
        assert [len(operations) for operations in TwoViewTransform(16)._operations] == [4, 5]

    @pytest.mark.parametrize(("image_size", "side"), [(8, 3), (32, 3), (40, 5), (96, 9), (224, 23)])
    def test_blur_kernel(self, image_size, side):
        blur = TwoViewTransform(image_size)._operations[0][-1]
        assert blur.side == side

    def test_statistics(self):
        images = smooth_images(64, 32, 32)
        views = levels(TwoViewTransform(32)({"pixel_values": images}, (0,))["pixel_values"])
        mean = images.float().mean()
        assert abs(views[:, 0].mean() - mean) < 12
        assert abs(views[:, 1].mean() - mean) < 25


class TestEval:
    @pytest.mark.parametrize(("height", "width"), [(36, 36), (37, 36), (36, 71)])
    def test_stored_images_are_only_cropped(self, height, width):
        images = smooth_images(2, height, width)
        found = EvalTransform(32)({"pixel_values": images}, (0,))["pixel_values"]
        top, left = (height - 32) // 2, (width - 32) // 2
        expected = images[..., top : top + 32, left : left + 32] / 255
        torch.testing.assert_close(found, (expected - MEAN) / STD, atol=1e-5, rtol=0)

    @pytest.mark.parametrize(("height", "width"), [(100, 100), (50, 81), (91, 40), (20, 20), (17, 30)])
    def test_others_are_resized_as_pillow_does(self, height, width):
        image = smooth_images(1, height, width)
        found = levels(EvalTransform(32)({"pixel_values": image}, (0,))["pixel_values"])[0]
        size = tuple(int(36 * side / min(height, width)) for side in (width, height))
        resized = np.asarray(to_pil(image[0]).resize(size, PIL.Image.Resampling.BICUBIC))
        top, left = (size[1] - 32) // 2, (size[0] - 32) // 2
        expected = torch.from_numpy(resized[top : top + 32, left : left + 32].copy()).permute(2, 0, 1)
        difference = (found - expected).abs()
        assert difference.max() < 1.01
        # The order of the two passes, which depends on Pillow's version for tall images, moves some roundings.
        assert difference.mean() < (0.001 if height <= width else 0.2)
        # Whole levels, as a stored image has.
        torch.testing.assert_close(found, found.round(), atol=1e-3, rtol=0)


class TestImageProcessor:
    SIZES = ((36, 36), (40, 31), (31, 57), (100, 64), (20, 90), (32, 33))

    @pytest.mark.parametrize("image_size", [32, 40])
    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
    def test_agrees_with_the_evaluation_path(self, tmp_path, image_size, mode):
        image_processor(image_size).save_pretrained(tmp_path)
        processor = AutoImageProcessor.from_pretrained(tmp_path)
        images = [to_pil(smooth_images(1, *size, seed=seed)[0]).convert(mode) for seed, size in enumerate(self.SIZES)]
        # CMYK has no PNG, which is what a data set would store.
        stored = [image.convert("RGB") if mode == "CMYK" else image for image in images]
        dataset = Dataset.from_dict({"image": stored}, features=Features({"image": Image()}))
        decoded = DecodedImages.from_dataset(dataset, image_size=image_size)
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in decoded])}
        found = EvalTransform(image_size)(batch, (0,))["pixel_values"]
        expected = processor(images, return_tensors="pt")["pixel_values"]
        assert expected.shape == (len(images), 3, image_size, image_size)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    def test_other_normalisation(self, tmp_path):
        options = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.6, 0.7)}
        image_processor(32, **options).save_pretrained(tmp_path)
        images = smooth_images(2, 36, 36)
        found = EvalTransform(32, **options)({"pixel_values": images}, (0,))["pixel_values"]
        expected = AutoImageProcessor.from_pretrained(tmp_path)(
            [to_pil(image) for image in images], return_tensors="pt"
        )
        torch.testing.assert_close(found, expected["pixel_values"], atol=1e-5, rtol=0)

    def test_saved_file_names_a_transformers_class(self, tmp_path):
        image_processor(224).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert saved["image_processor_type"] == "BitImageProcessor"
        assert saved["size"] == {"shortest_edge": 256}
        assert saved["crop_size"] == {"height": 224, "width": 224}

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_pipeline(self, tmp_path, mode):
        """A pipeline on the saved model sees what evaluation saw; with transparency too, which it drops."""
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        model = ResNetForImageClassification(config).eval()
        model.save_pretrained(tmp_path)
        image_processor(32).save_pretrained(tmp_path)
        image = to_pil(smooth_images(1, 50, 41)[0]).convert(mode)
        if mode == "RGBA":
            image.putalpha(100)
        decoded = DecodedImages.from_dataset(
            Dataset.from_dict({"image": [image]}, features=Features({"image": Image()})), image_size=32
        )
        pixels = EvalTransform(32)({"pixel_values": decoded[0]["pixel_values"][None]}, (0,))["pixel_values"]
        with torch.no_grad():
            expected = model(pixels).logits.softmax(-1)[0]
        answer = pipeline("image-classification", model=str(tmp_path), device="cpu")(image, top_k=3)
        found = {item["label"]: item["score"] for item in answer}
        for label, score in enumerate(expected.tolist()):
            assert found[f"LABEL_{label}"] == pytest.approx(score, abs=1e-5)

    def test_opens_without_this_package(self, tmp_path):
        image_processor(32).save_pretrained(tmp_path)
        script = (
            "import sys; from transformers import AutoImageProcessor; import numpy, PIL.Image\n"
            f"processor = AutoImageProcessor.from_pretrained({str(tmp_path)!r})\n"
            "image = PIL.Image.fromarray(numpy.full((50, 40, 3), 255, dtype='uint8'))\n"
            "print(processor(image, return_tensors='np')['pixel_values'].shape, 'bissl_hf' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert result.stdout.strip() == "(1, 3, 32, 32) False", result.stderr


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"crop_scale": (0.5, 0.2)}, r"`crop_scale` is \(0\.5, 0\.2\)"),
            ({"crop_scale": (0.0, 0.2)}, r"`crop_scale` is .* above 0"),
            ({"crop_scale": (0.5, 1.5)}, r"`crop_scale` is .* at most 1"),
            ({"crop_ratio": (-1.0, 1.0)}, r"`crop_ratio` is .* above 0"),
            ({"crop_ratio": (1.0, float("inf"))}, r"`crop_ratio` is .* finite"),
            ({"horizontal_flip": 1.1}, r"`horizontal_flip` is 1\.1; it must be a probability"),
            ({"color_jitter": -0.1}, r"`color_jitter` is -0\.1; it must be a probability"),
            ({"grayscale": 2}, "`grayscale` is 2; it must be a probability"),
            ({"blur": (0.5, 2.0)}, r"`blur\[1\]` is 2\.0; it must be a probability"),
            ({"blur": (0.5,)}, r"`blur` is \(0\.5,\); it must have 2 probabilities"),
            ({"solarize": (-1.0, 0.0)}, r"`solarize\[0\]` is -1\.0; it must be a probability"),
            ({"mean": (0.5,)}, r"`mean` is \(0\.5,\); it must have 3 numbers"),
            ({"std": (0.5, 0.5, 0.0)}, r"`std` is .*; all three must be above 0"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            TwoViewTransform(16, **options)

    @pytest.mark.parametrize("build", [TwoViewTransform, TrainTransform, EvalTransform, image_processor])
    def test_image_size(self, build):
        with pytest.raises(ValueError, match="`image_size` is 0; it must be at least 2"):
            build(0)
        with pytest.raises(TypeError, match=r"`image_size` is 9\.5; it must be an integer"):
            build(9.5)

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            ({"labels": torch.zeros(1)}, ValueError, r"The inputs are \['labels'\]; they must have 'pixel_values'"),
            ({"pixel_values": torch.zeros(1, 3, 8, 8)}, TypeError, r"is torch\.float32; .* torch\.uint8"),
            ({"pixel_values": [1, 2]}, TypeError, r"`pixel_values` is list; .* torch\.uint8"),
            ({"pixel_values": torch.zeros(3, 8, 8, dtype=torch.uint8)}, ValueError, r"the shape \(3, 8, 8\)"),
            ({"pixel_values": torch.zeros(1, 1, 8, 8, dtype=torch.uint8)}, ValueError, r"the shape \(1, 1, 8, 8\)"),
        ],
    )
    @pytest.mark.parametrize("transform", ALL, ids=name_of)
    def test_inputs(self, transform, inputs, error, message):
        with pytest.raises(error, match=message):
            transform(inputs, (0,))


@pytest.mark.parametrize("kind", [TwoViewTransform, TrainTransform])
def test_settings_say_what_a_transform_was_made_with(kind):
    settings = kind(8, crop_scale=(0.5, 1.0), mean=(0.0, 0.1, 0.2)).settings
    assert settings == json.loads(json.dumps(settings))
    assert settings["crop_scale"] == [0.5, 1.0]
    assert settings["image_mean"] == [0.0, 0.1, 0.2]
    assert {"image_size", "image_std", "resample", "crop_ratio", "horizontal_flip"} <= set(settings)
    views = {"color_jitter", "grayscale", "blur", "solarize"}
    assert views & set(settings) == (views if kind is TwoViewTransform else set())
