import logging
import pickle
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List
from torch.utils.data import DataLoader
from transformers import default_data_collator

from bissl_hf.data import decoded
from bissl_hf.data.decoded import DecodedImages, resize_and_crop_square, resize_side


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def make_split(images: list, labels: list[int] | None = None) -> Dataset:
    features = {"image": Image()} | ({"label": ClassLabel(names=["a", "b"])} if labels is not None else {})
    columns = {"image": images} | ({"label": labels} if labels is not None else {})
    return Dataset.from_dict(columns, features=Features(features))


def centre(image: PIL.Image.Image, size: int) -> np.ndarray:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


class TestGeometry:
    @pytest.mark.parametrize(("image_size", "side"), [(224, 256), (96, 109), (32, 36), (28, 32)])
    def test_resize_side(self, image_size, side):
        assert resize_side(image_size) == side

    def test_errors(self):
        with pytest.raises(TypeError, match=r"`image_size` is 32\.0"):
            resize_side(32.0)
        with pytest.raises(ValueError, match="`image_size` is 1; it must be at least 2"):
            resize_side(1)

    @pytest.mark.parametrize("image_size", [28, 33, 40, 41])  # 4 and 5 below the stored side, even and odd
    @pytest.mark.parametrize("width", range(42, 56))
    @pytest.mark.parametrize("upright", [True, False])
    def test_crop_of_square_is_crop_of_whole_image(self, image_size, width, upright):
        """Every parity of the three lengths, for the long side in either direction."""
        image = random_image(41, width) if upright else random_image(width, 41)
        side = image_size * 256 // 224
        short = min(image.size)
        size = tuple(int(side * length / short) for length in image.size)
        expected = centre(image.resize(size, PIL.Image.Resampling.BICUBIC), image_size)
        square = resize_and_crop_square(image, image_size)
        assert square.size == (side, side)
        np.testing.assert_array_equal(centre(square, image_size), expected)


class TestContent:
    def test_native_size_keeps_the_pixels(self):
        images = [random_image(10, 10, seed=seed) for seed in range(3)]
        stored = DecodedImages.from_dataset(make_split(images, [0, 1, 0]), image_size=32, native_size=True)
        assert stored.image_shape == (3, 10, 10)
        for row, image in enumerate(images):
            np.testing.assert_array_equal(stored[row]["pixel_values"].numpy(), np.moveaxis(np.asarray(image), -1, 0))

    @pytest.mark.parametrize("sizes", [[(40, 40), (41, 41)], [(40, 30), (40, 30)]], ids=["different", "oblong"])
    def test_native_size_falls_back_to_squares(self, sizes):
        stored = DecodedImages.from_dataset(
            make_split([random_image(*size) for size in sizes]), image_size=32, native_size=True
        )
        assert stored.image_shape == (3, 36, 36)

    def test_evaluation_images_are_always_resized(self):
        images = [random_image(50, 50), random_image(50, 50, seed=1)]
        stored = DecodedImages.from_dataset(make_split(images), image_size=32)
        expected = np.asarray(images[1].resize((36, 36), PIL.Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(stored[1]["pixel_values"].numpy(), np.moveaxis(expected, -1, 0))

    @pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
    def test_modes(self, mode):
        image = random_image(8, 8, "L").convert("I;16") if mode == "I;16" else random_image(8, 8, mode)
        buffer = BytesIO()
        image.save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        dataset = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
        stored = DecodedImages.from_dataset(dataset.cast_column("image", Image()), image_size=8, native_size=True)
        expected = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), expected)

    def test_deep_images_are_clipped_with_a_warning(self, caplog):
        deep = PIL.Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16))
        with caplog.at_level(logging.WARNING):
            stored = DecodedImages.from_dataset(make_split([deep, random_image(8, 8)]), image_size=8)
        assert "1 of 2 images have more than 8 bits" in caplog.text
        assert stored[0]["pixel_values"].unique().tolist() == [255]

    def test_exif_orientation_is_applied(self):
        image = random_image(8, 8)
        exif = PIL.Image.Exif()
        exif[PIL.Image.ExifTags.Base.Orientation] = 6
        buffer = BytesIO()
        image.save(buffer, "PNG", exif=exif)
        dataset = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
        stored = DecodedImages.from_dataset(dataset.cast_column("image", Image()), image_size=8, native_size=True)
        expected = np.rot90(np.asarray(image), k=-1)
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), np.moveaxis(expected, -1, 0))

    def test_formatted_dataset(self):
        dataset = make_split([random_image(8, 8)], [1]).with_format("torch")
        stored = DecodedImages.from_dataset(dataset, image_size=8)
        assert stored[0]["labels"] == 1


class TestReading:
    def test_rows(self):
        images = [random_image(8, 8, seed=seed) for seed in range(5)]
        stored = DecodedImages.from_dataset(make_split(images, [0, 1, 1, 0, 1]), image_size=8, native_size=True)
        rows = stored.__getitems__([4, 0, 4])
        assert [row["labels"] for row in rows] == [1, 0, 1]
        assert all(type(row["labels"]) is int and row["pixel_values"].dtype == torch.uint8 for row in rows)
        for row, index in zip(rows, (4, 0, 4), strict=True):
            assert torch.equal(row["pixel_values"], stored[index]["pixel_values"])
            np.testing.assert_array_equal(row["pixel_values"][0].numpy(), np.asarray(images[index])[..., 0])
        assert len(stored) == 5
        assert stored.class_names == ["a", "b"]
        np.testing.assert_array_equal(stored.labels, np.array([0, 1, 1, 0, 1]))
        assert stored.labels.dtype == np.int64

    def test_no_labels(self):
        stored = DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=8)
        assert set(stored[0]) == {"pixel_values"}
        assert stored.labels is None
        assert stored.class_names is None

    def test_changing_an_example_leaves_the_data_alone(self):
        stored = DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=8)
        before = stored[0]["pixel_values"].clone()
        stored[0]["pixel_values"].zero_()
        assert torch.equal(stored[0]["pixel_values"], before)

    def test_blocks_are_put_together_in_order(self, monkeypatch):
        monkeypatch.setattr(decoded, "_BLOCK_ROWS", 3)
        images = [PIL.Image.fromarray(np.full((8, 8, 3), row, dtype=np.uint8)) for row in range(8)]
        stored = DecodedImages.from_dataset(make_split(images), image_size=8)
        assert [stored[row]["pixel_values"].unique().tolist() for row in range(8)] == [[row] for row in range(8)]


class TestFile:
    @pytest.fixture(autouse=True)
    def always_a_file(self, monkeypatch):
        monkeypatch.setattr(decoded, "MAX_BYTES_IN_MEMORY", 0)

    def test_same_content_as_in_memory(self, monkeypatch, tmp_path):
        dataset = make_split([random_image(20, 17, seed=seed) for seed in range(3)], [0, 1, 0])
        mapped = DecodedImages.from_dataset(dataset, image_size=14, cache_dir=tmp_path)
        monkeypatch.setattr(decoded, "MAX_BYTES_IN_MEMORY", 2**20)
        in_memory = DecodedImages.from_dataset(dataset, image_size=14)
        assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
        for row in range(3):
            assert torch.equal(mapped[row]["pixel_values"], in_memory[row]["pixel_values"])
            assert mapped[row]["labels"] == in_memory[row]["labels"]

    def test_is_found_again(self, monkeypatch, tmp_path):
        dataset = make_split([random_image(8, 8)])
        first = DecodedImages.from_dataset(dataset, image_size=8, cache_dir=tmp_path)
        monkeypatch.setattr(decoded, "load_image", lambda image: pytest.fail("decoded again"))
        again = DecodedImages.from_dataset(dataset, image_size=8, cache_dir=tmp_path)
        assert torch.equal(first[0]["pixel_values"], again[0]["pixel_values"])

    def test_a_native_file_is_found_without_reading_headers(self, monkeypatch, tmp_path):
        dataset = make_split([random_image(8, 8, seed=seed) for seed in range(3)])
        first = DecodedImages.from_dataset(dataset, image_size=14, native_size=True, cache_dir=tmp_path)
        monkeypatch.setattr(decoded, "_header_size", lambda value: pytest.fail("read a header"))
        again = DecodedImages.from_dataset(dataset, image_size=14, native_size=True, cache_dir=tmp_path)
        assert again.image_shape == (3, 8, 8)
        assert torch.equal(first[2]["pixel_values"], again[2]["pixel_values"])

    def test_geometry_and_content_name_the_file(self, tmp_path):
        dataset = make_split([random_image(16, 16), random_image(16, 16)])
        DecodedImages.from_dataset(dataset, image_size=14, cache_dir=tmp_path)
        DecodedImages.from_dataset(dataset, image_size=15, cache_dir=tmp_path)
        DecodedImages.from_dataset(dataset, image_size=14, native_size=True, cache_dir=tmp_path)
        DecodedImages.from_dataset(dataset.select([0]), image_size=14, cache_dir=tmp_path)
        assert len(list(tmp_path.iterdir())) == 4

    def test_changed_image_file_is_decoded_again(self, tmp_path):
        path = tmp_path / "image.png"
        for value in (10, 200):
            pixels = np.full((8, 8 + value % 7, 3), value, dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(path)
            dataset = Dataset.from_dict({"image": [str(path)]}).cast_column("image", Image())
            stored = DecodedImages.from_dataset(dataset, image_size=8, cache_dir=tmp_path / "cache")
            assert stored[0]["pixel_values"].unique().tolist() == [value]

    def test_failed_decoding_leaves_nothing(self, tmp_path):
        dataset = Dataset.from_dict({"image": [{"bytes": b"no image", "path": None}]}).cast_column("image", Image())
        with pytest.raises(ValueError, match="cannot be read"):
            DecodedImages.from_dataset(dataset, image_size=8, cache_dir=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_default_folder(self, monkeypatch, tmp_path):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=8)
        assert len(list((tmp_path / "bissl_hf").glob("*.npy"))) == 1

    def test_pickle_holds_the_path_only(self, tmp_path):
        dataset = make_split([random_image(64, 64, seed=seed) for seed in range(4)], [0, 1, 0, 1])
        stored = DecodedImages.from_dataset(dataset, image_size=56, cache_dir=tmp_path)
        content = pickle.dumps(stored)
        assert len(content) < 64 * 64
        again = pickle.loads(content)
        assert torch.equal(again[3]["pixel_values"], stored[3]["pixel_values"])
        assert again[3]["labels"] == 1


@pytest.mark.parametrize("limit", [0, 2**20], ids=["file", "memory"])
def test_loader_workers(monkeypatch, tmp_path, limit):
    monkeypatch.setattr(decoded, "MAX_BYTES_IN_MEMORY", limit)
    dataset = make_split([random_image(8, 8, seed=seed) for seed in range(4)], [0, 1, 0, 1])
    stored = DecodedImages.from_dataset(dataset, image_size=8, cache_dir=tmp_path)
    loader = DataLoader(stored, batch_size=2, num_workers=1, multiprocessing_context="spawn")
    batches = list(loader)
    assert [batch["labels"].tolist() for batch in batches] == [[0, 1], [0, 1]]
    assert torch.equal(batches[1]["pixel_values"][1], stored[3]["pixel_values"])


class TestErrors:
    def test_unreadable_image_names_row_and_file(self, tmp_path):
        good, bad = tmp_path / "good.png", tmp_path / "bad.png"
        random_image(8, 8).save(good)
        bad.write_bytes(good.read_bytes()[:60])
        dataset = Dataset.from_dict({"image": [str(good), str(bad)]}).cast_column("image", Image())
        with pytest.raises(ValueError, match=r"The image in row 1 of the split 'given' \(.*bad.png\) cannot be read"):
            DecodedImages.from_dataset(dataset, image_size=8)

    @pytest.mark.parametrize("native_size", [True, False])
    def test_missing_image(self, native_size):
        dataset = make_split([random_image(8, 8), None])
        with pytest.raises(ValueError, match="There is no image in row 1"):
            DecodedImages.from_dataset(dataset, image_size=8, native_size=native_size)

    def test_empty_split(self):
        with pytest.raises(ValueError, match="`dataset` is empty"):
            DecodedImages.from_dataset(make_split([]), image_size=8)

    def test_no_image_column(self):
        with pytest.raises(ValueError, match=r"has the columns \['picture'\]; it must have a column 'image'"):
            DecodedImages.from_dataset(Dataset.from_dict({"picture": [1]}), image_size=8)

    def test_wrong_array(self):
        with pytest.raises(ValueError, match=r"`pixels` is float64 of shape \(1, 3, 2, 2\)"):
            DecodedImages(np.zeros((1, 3, 2, 2)))

    def test_wrong_labels(self):
        with pytest.raises(ValueError, match=r"`labels` has the shape \(2,\); it must be \(1,\) or \(1, classes\)"):
            DecodedImages(np.zeros((1, 3, 2, 2), dtype=np.uint8), labels=np.zeros(2, dtype=np.int64))


def test_several_classes_become_rows_of_zeros_and_ones():
    features = Features({"image": Image(), "label": List(ClassLabel(names=["a", "b", "c"]))})
    pictures = [PIL.Image.new("RGB", (4, 4), (row, 0, 0)) for row in range(4)]
    split = Dataset.from_dict({"image": pictures, "label": [[2, 0], [], [1], [1, 1]]}, features=features)
    images = DecodedImages.from_dataset(split, image_size=4)
    assert images.class_names == ["a", "b", "c"]
    expected = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 1, 0]], dtype=torch.float32)
    batch = default_data_collator([images[row] for row in range(4)])
    torch.testing.assert_close(batch["labels"], expected, rtol=0, atol=0)
