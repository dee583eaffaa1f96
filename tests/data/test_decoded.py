import errno
import fcntl
import logging
import os
import pickle
import re
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, List
from torch.utils.data import DataLoader
from transformers import default_data_collator

from bissl_hf.data import decoded, reading
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

    def stored(self, *images: PIL.Image.Image, format: str = "TIFF") -> DecodedImages:
        rows = []
        for image in images:
            buffer = BytesIO()
            image.save(buffer, format)
            rows.append({"bytes": buffer.getvalue(), "path": None})
        dataset = Dataset.from_dict({"image": rows}).cast_column("image", Image())
        return DecodedImages.from_dataset(dataset, image_size=8, native_size=True)

    def test_deep_images_are_scaled_with_a_warning(self, caplog):
        deep = PIL.Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040)
        with caplog.at_level(logging.WARNING):
            stored = self.stored(deep, random_image(8, 8))
        assert "1 of 2 images have more than 8 bits" in caplog.text
        expected = np.round(np.asarray(deep, dtype=np.float64) / 257).astype(np.uint8)
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), np.stack([expected] * 3))

    def test_float_images_from_0_to_1_are_scaled_with_a_warning(self, caplog):
        values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
        with caplog.at_level(logging.WARNING):
            stored = self.stored(PIL.Image.fromarray(values), PIL.Image.fromarray(values * 255))
        assert "1 of 2 images have float values from 0 to 1" in caplog.text
        expected = np.stack([np.round(values.astype(np.float64) * 255).astype(np.uint8)] * 3)
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), expected)
        np.testing.assert_allclose(stored[1]["pixel_values"].numpy(), expected, atol=1)

    @pytest.mark.parametrize("dtype", [np.dtype(">u2"), np.dtype("<u2"), np.int32, np.float32])
    def test_deep_modes_of_either_byte_order(self, dtype):
        values = np.arange(64).reshape(8, 8) * 4
        stored = self.stored(PIL.Image.fromarray(values.astype(dtype)))
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), np.stack([values.clip(0, 255)] * 3))

    @pytest.mark.parametrize("values", [[np.nan], [np.inf], [-1.0], [1e6]])
    def test_values_that_may_mean_anything_are_refused(self, values):
        image = PIL.Image.fromarray(np.full((8, 8), values, dtype=np.float32))
        with pytest.raises(ValueError, match=r"cannot be read: its values reach from .* convert it to 8 bits"):
            self.stored(image)

    @pytest.mark.parametrize("transparency", [0, bytes(range(200))])
    def test_transparent_palettes_keep_their_colours(self, transparency):
        image = random_image(8, 8, "P")
        buffer = BytesIO()
        image.save(buffer, "PNG", transparency=transparency)
        dataset = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
        stored = DecodedImages.from_dataset(dataset.cast_column("image", Image()), image_size=8, native_size=True)
        expected = np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), expected)

    def test_every_mode_of_pillow_becomes_rgb_or_is_refused(self):
        # LAB needs a colour profile.
        for mode in (
            "1",
            "L",
            "P",
            "RGB",
            "RGBA",
            "CMYK",
            "YCbCr",
            "HSV",
            "I",
            "F",
            "LA",
            "PA",
            "RGBX",
            "RGBa",
            "La",
            "I;16",
            "I;16L",
            "I;16B",
        ):
            rgb, _ = reading.to_rgb(PIL.Image.new(mode, (2, 2)))
            assert (rgb.mode, rgb.size) == ("RGB", (2, 2))

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

    @pytest.mark.parametrize(
        ("entry", "turned"),
        [
            ((3, 1, struct.pack("<HH", 6, 0)), True),
            ((4, 1, struct.pack("<I", 6)), True),
            ((3, 1, struct.pack("<HH", 99, 0)), False),
            ((2, 2, b"6\0\0\0"), False),
            ((5, 1, struct.pack("<I", 38)), False),
            ((3, 9, struct.pack("<I", 10_000)), False),
        ],
        ids=["short", "long", "no orientation", "text", "fraction", "beyond the end"],
    )
    @pytest.mark.filterwarnings("ignore:Truncated File Read:UserWarning")  # of Pillow, once
    def test_damaged_exif_is_left_aside(self, entry, turned):
        """An orientation of odd types, beside a camera's name that is stored as a fraction."""
        kind, count, value = entry
        name = struct.pack("<HHII", 0x0110, 5, 1, 38)
        orientation = struct.pack("<HHI", 0x0112, kind, count) + value
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + name + orientation + struct.pack("<III", 0, 22, 10)
        image = random_image(8, 8)
        buffer = BytesIO()
        image.save(buffer, "JPEG", exif=exif, quality=100, subsampling=0)
        dataset = Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
        stored = DecodedImages.from_dataset(dataset.cast_column("image", Image()), image_size=8, native_size=True)
        expected = np.asarray(PIL.Image.open(BytesIO(buffer.getvalue())).convert("RGB"))
        expected = np.rot90(expected, k=-1) if turned else expected
        np.testing.assert_array_equal(stored[0]["pixel_values"].numpy(), np.moveaxis(expected, -1, 0))

    @pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (3000, 7)])
    def test_the_middle_of_a_thin_image(self, size, monkeypatch):
        image = PIL.Image.effect_noise(size, 80).convert("RGB")
        side = resize_side(32)
        monkeypatch.setattr(decoded, "_LONGEST_ASPECT", 10**9)
        # Whole, it would have 60,000 x 36 times 36 pixels.
        whole = None if max(size) > 10_000 else resize_and_crop_square(image, 32)
        monkeypatch.undo()
        square = resize_and_crop_square(image, 32)
        assert square.size == (side, side)
        if whole is not None:
            np.testing.assert_allclose(np.asarray(square, float), np.asarray(whole, float), atol=3)

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
        monkeypatch.setattr(reading, "_BLOCK_ROWS", 3)
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
        monkeypatch.setattr(reading, "to_rgb", lambda image: pytest.fail("decoded again"))
        again = DecodedImages.from_dataset(dataset, image_size=8, cache_dir=tmp_path)
        assert torch.equal(first[0]["pixel_values"], again[0]["pixel_values"])

    def test_a_native_file_is_found_without_reading_headers(self, monkeypatch, tmp_path):
        dataset = make_split([random_image(8, 8, seed=seed) for seed in range(3)])
        first = DecodedImages.from_dataset(dataset, image_size=14, native_size=True, cache_dir=tmp_path)
        monkeypatch.setattr(reading, "_header_size", lambda file: pytest.fail("read a header"))
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

    @pytest.mark.parametrize("damage", ["empty", "half", "header", "longer", "no header", "other shape"])
    @pytest.mark.parametrize("native_size", [True, False])
    def test_a_damaged_file_is_made_anew(self, tmp_path, damage, native_size):
        dataset = make_split([random_image(8, 8, seed=seed) for seed in range(3)])
        options = {"image_size": 14, "native_size": native_size, "cache_dir": tmp_path}
        expected = [row["pixel_values"].clone() for row in DecodedImages.from_dataset(dataset, **options)]
        (path,) = tmp_path.iterdir()
        content = path.read_bytes()
        other = BytesIO()
        np.save(other, np.zeros((2, 3, 8, 8), dtype=np.uint8))
        damaged = {
            "empty": b"",
            "half": content[: len(content) // 2],
            "header": content[:128],
            "longer": content + b"0",
            "no header": b"x" * len(content),
            "other shape": other.getvalue(),
        }
        path.write_bytes(damaged[damage])
        again = DecodedImages.from_dataset(dataset, **options)
        assert all(torch.equal(again[row]["pixel_values"], expected[row]) for row in range(3))
        assert path.read_bytes() == content

    def test_leftovers_of_killed_processes_are_removed(self, tmp_path):
        (tmp_path / "incomplete-old").mkdir()
        (tmp_path / "incomplete-old" / "x.npy").write_bytes(b"half")
        (tmp_path / "incomplete-0.npy").write_bytes(b"half")
        with (tmp_path / "incomplete-1.npy").open("wb") as living:
            fcntl.flock(living, fcntl.LOCK_EX)
            DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=8, cache_dir=tmp_path)
            names = {path.name for path in tmp_path.iterdir()}
            assert {name for name in names if name.startswith("incomplete")} == {"incomplete-1.npy"}
            assert len(names) == 2

    def test_what_a_killed_process_was_writing_is_removed(self, tmp_path):
        command = (
            "import os, pathlib, signal, sys; from bissl_hf.data.pixel_file import write_pixels; "
            "write_pixels(pathlib.Path(sys.argv[1]) / 'x.npy', (4, 3, 8, 8), lambda _: os.kill(os.getpid(), 9))"
        )
        killed = subprocess.run([sys.executable, "-c", command, str(tmp_path)], check=False)
        assert killed.returncode == -9
        assert [path.name.startswith("incomplete-") for path in tmp_path.iterdir()] == [True]
        DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=8, cache_dir=tmp_path)
        assert [path.name.startswith("incomplete-") for path in tmp_path.iterdir()] == [False]

    def test_processes_that_write_the_same_file(self, tmp_path):
        """They are threads here; the locks are of open files."""
        dataset = make_split([random_image(40, 40, seed=seed) for seed in range(64)])

        def decode(_: int) -> DecodedImages:
            return DecodedImages.from_dataset(dataset, image_size=32, cache_dir=tmp_path)

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(decode, range(6)))
        assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]
        for images in found[1:]:
            np.testing.assert_array_equal(images._pixels, found[0]._pixels)

    @pytest.mark.parametrize("reserves", [True, False])
    def test_a_full_disk_is_told_before_the_work(self, monkeypatch, tmp_path, reserves):
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        if reserves:
            monkeypatch.setattr(os, "posix_fallocate", full)
        else:
            monkeypatch.delattr(os, "posix_fallocate")
            monkeypatch.setattr("bissl_hf.data.pixel_file._free", lambda folder: 10)
        monkeypatch.setattr(reading, "to_rgb", lambda image: pytest.fail("worked"))
        message = r"The cache folder '.*' has no room: 491 bytes are needed and [\d,]+ are free; set HF_DATASETS_CACHE"
        with pytest.raises(ValueError, match=message):
            DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=10, cache_dir=tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_room_is_reserved_where_the_disk_cannot(self, monkeypatch, tmp_path):
        def unsupported(*_: object) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "posix_fallocate", unsupported)
        stored = DecodedImages.from_dataset(make_split([random_image(8, 8)]), image_size=8, cache_dir=tmp_path)
        assert stored.image_shape == (3, 9, 9)

    def test_a_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("no folder")
        with pytest.raises(
            ValueError, match=r"The cache folder '.*file/x' cannot be written: .*; set HF_DATASETS_CAC"
        ):
            DecodedImages.from_dataset(
                make_split([random_image(8, 8)]), image_size=8, cache_dir=tmp_path / "file" / "x"
            )

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

    def broken(self, total: int, rows: dict[int, bytes | None]) -> Dataset:
        buffer = BytesIO()
        random_image(8, 8).save(buffer, "PNG")
        images = [{"bytes": buffer.getvalue(), "path": f"{row}.png"} for row in range(total)]
        for row, content in rows.items():
            images[row] = None if content is None else {"bytes": content, "path": f"{row}.png"}
        features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
        return Dataset.from_dict({"image": images, "label": [row % 2 for row in range(total)]}, features=features)

    @pytest.mark.parametrize("native_size", [True, False])
    def test_all_unreadable_images_are_named(self, native_size):
        dataset = self.broken(600, {3: b"no image", 300: b"no image", 599: None})
        message = (
            r"3 of 600 images of the split 'given' cannot be read: row 3 \(3.png\), row 300 \(300.png\): cannot "
            r"identify image file; row 599: there is no image\. .*unreadable='skip'"
        )
        with pytest.raises(ValueError, match=message):
            DecodedImages.from_dataset(dataset, image_size=8, native_size=native_size)

    @pytest.mark.parametrize("limit", [0, 2**20], ids=["file", "memory"])
    @pytest.mark.parametrize("native_size", [True, False])
    def test_unreadable_images_are_left_out(self, monkeypatch, tmp_path, caplog, limit, native_size):
        monkeypatch.setattr(decoded, "MAX_BYTES_IN_MEMORY", limit)
        dataset = self.broken(10, {2: b"no image", 5: None})
        options = {"image_size": 8, "native_size": native_size, "cache_dir": tmp_path, "unreadable": "skip"}
        for told in ("Left out: 2 of 10 images .* row 2", "2 of 10 images cannot be read and are left out"):
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                stored = DecodedImages.from_dataset(dataset, **options)
            assert stored.labels.tolist() == [0, 1, 1, 0, 0, 1, 0, 1]
            assert len(stored) == 8
            assert re.search(told, caplog.text)

    def test_a_damaged_list_of_unreadable_images_is_made_anew(self, monkeypatch, tmp_path):
        monkeypatch.setattr(decoded, "MAX_BYTES_IN_MEMORY", 0)
        dataset = self.broken(4, {2: b"no image"})
        options = {"image_size": 8, "cache_dir": tmp_path, "unreadable": "skip"}
        DecodedImages.from_dataset(dataset, **options)
        (path,) = tmp_path.glob("*.json")
        for content in (b"", b"[9]", b"[0, 1, 2, 3]", b'{"a": 1}', b"[1]"):
            path.write_bytes(content)
            assert len(DecodedImages.from_dataset(dataset, **options)) == 3 if content != b"[1]" else 2

    def test_nothing_that_can_be_read(self):
        with pytest.raises(ValueError, match="2 of 2 images of the split 'given' cannot be read"):
            DecodedImages.from_dataset(self.broken(2, {0: b"", 1: None}), image_size=8, unreadable="skip")

    def test_other_words(self):
        with pytest.raises(ValueError, match=r"`unreadable` is 'ignore'; it must be one of \('stop', 'skip'\)"):
            DecodedImages.from_dataset(self.broken(2, {}), image_size=8, unreadable="ignore")

    @pytest.mark.parametrize("kind", [KeyError, RuntimeError, ZeroDivisionError, struct.error, AttributeError])
    def test_whatever_a_decoder_raises(self, monkeypatch, kind):
        def failing(image: PIL.Image.Image) -> None:
            raise kind("odd")

        monkeypatch.setattr(reading, "to_rgb", failing)
        with pytest.raises(ValueError, match=r"The image in row 0 of the split 'given' .0.png. cannot be read: '?odd"):
            DecodedImages.from_dataset(self.broken(1, {}), image_size=8)

    def test_lack_of_memory_is_no_fault_of_an_image(self, monkeypatch):
        def failing(image: PIL.Image.Image) -> None:
            raise MemoryError

        monkeypatch.setattr(reading, "to_rgb", failing)
        with pytest.raises(MemoryError):
            DecodedImages.from_dataset(self.broken(1, {}), image_size=8)

    def test_nothing_is_fetched(self):
        dataset = Dataset.from_dict({"image": ["http://127.0.0.1:9/x.png"]}).cast_column("image", Image())
        with pytest.raises(ValueError, match="it is an address, from which nothing is fetched"):
            DecodedImages.from_dataset(dataset, image_size=8)

    def test_names_cannot_reach_the_terminal(self, tmp_path):
        path = tmp_path / "\x1b[31mred.png"
        path.write_bytes(b"no image")
        dataset = Dataset.from_dict({"image": [str(path)]}).cast_column("image", Image())
        with pytest.raises(ValueError, match=r"\\x1b\[31mred.png") as info:
            DecodedImages.from_dataset(dataset, image_size=8)
        assert "\x1b" not in str(info.value)

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
