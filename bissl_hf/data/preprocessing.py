"""What a backbone expects of its images: mean and deviation of the channels, size and filter of the resizing."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file, logging

from .resampling import check_resample

logger = logging.get_logger(__name__)

# Names of Pillow's filters in the configurations of timm.
_TIMM_FILTERS = {name.lower(): int(number) for name, number in PILImageResampling.__members__.items()}


@dataclass(frozen=True)
class Preprocessing:
    """How images are prepared for a backbone.

    The resizing itself is that of this package: the short side to `image_size * 256 / 224`, and a square from the
    middle; some processors squeeze the whole image into the square instead.

    Args:
        mean, std (`tuple[float, float, float]`): of the channels of images from 0 to 1.
        image_size (`int`, *optional*): side of the square images, in pixels; `None` if the processor does not say.
        resample (`int`): number of Pillow's filter.
    """

    mean: tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    std: tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)
    image_size: int | None = None
    resample: int = int(PILImageResampling.BICUBIC)

    @property
    def side(self) -> int:
        """Side of the images, in pixels.

        Raises:
            `ValueError`: if it is not known.
        """
        if self.image_size is None:
            raise ValueError("The image processor names no size of images; give `image_size`.")
        return self.image_size

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of a transform beside the size."""
        return {"mean": self.mean, "std": self.std, "resample": self.resample}

    def describe(self) -> str:
        """Returns all of it as a phrase: `"96 x 96 pixels, bicubic, mean 0.485 0.456 0.406, deviation ..."`."""
        size = f"{self.side} x {self.side} pixels, {PILImageResampling(self.resample).name.lower()}"
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{size}, mean {mean}, deviation {std}"

    @classmethod
    def from_processor(cls, processor: Any, *, image_size: int | None = None) -> "Preprocessing":
        """Reads an image processor of `transformers`.

        Args:
            processor: an image processor, its dictionary (as in `preprocessor_config.json`), or a `Preprocessing`.
            image_size (`int`, *optional*): side of the images, in pixels; that of the processor if not given.

        Raises:
            `TypeError`: for anything else.
            `ValueError`: if it does what the transforms of this package do not.
        """
        if isinstance(processor, Preprocessing):
            return processor if image_size is None else replace(processor, image_size=image_size)
        settings = processor if isinstance(processor, Mapping) else None
        if settings is None and callable(getattr(processor, "to_dict", None)):
            settings = processor.to_dict()
        if settings is None:
            raise TypeError(
                f"`processor` is a {type(processor).__name__}; it must be an image processor of transformers, its "
                "dictionary or a Preprocessing."
            )
        if settings.get("do_flip_channel_order"):
            raise ValueError(
                "The image processor has do_flip_channel_order: it feeds blue before red, which the transforms of "
                "this package do not. Use another backbone, or a transform of your own."
            )
        mean, std = _normalization(settings)
        resample = settings.get("resample")
        resample = cls.resample if resample is None else int(resample)
        check_resample(resample)
        return cls(mean, std, _image_size(settings) if image_size is None else image_size, resample)

    @classmethod
    def from_timm(cls, settings: Mapping[str, Any]) -> "Preprocessing":
        """Reads the `pretrained_cfg` of a model of timm.

        Raises:
            `ValueError`: if it names an unknown filter.
        """
        size = settings.get("input_size", (3, None, None))[-1]
        resample = _TIMM_FILTERS.get(settings.get("interpolation", "bicubic"), -1)
        check_resample(resample)
        mean, std = settings.get("mean", cls.mean), settings.get("std", cls.std)
        return cls(_three(mean, "mean"), _three(std, "std"), size, resample)


def load_preprocessing(source: str, *, image_size: int | None = None) -> Preprocessing | None:
    """Returns how images are prepared for a model, by the `preprocessor_config.json` beside it, or the configuration
    of a model of timm; `None` where there is neither.

    Args:
        source (`str`): folder or Hub id.
        image_size (`int`, *optional*): side of the images, in pixels, in place of the one that is found.

    Raises:
        `ValueError`: see [`Preprocessing.from_processor`].
    """
    if (settings := _read(source, IMAGE_PROCESSOR_NAME)) is not None:
        return Preprocessing.from_processor(settings, image_size=image_size)
    config = _read(source, CONFIG_NAME) or {}
    if "pretrained_cfg" not in config:
        return None
    return Preprocessing.from_processor(Preprocessing.from_timm(config["pretrained_cfg"]), image_size=image_size)


def warn_of_other_preprocessing(source: str, used: Preprocessing) -> None:
    """Warns if images are normalised otherwise than the backbone of a folder or Hub id expects.

    Args:
        source (`str`): folder or Hub id of the backbone.
        used ([`Preprocessing`]): of the images.
    """
    own = load_preprocessing(source)
    if own and any(abs(a - b) > 1e-3 for a, b in zip(own.mean + own.std, used.mean + used.std, strict=True)):
        mean, std, expected_mean, expected_std = (
            " ".join(f"{value:.4g}" for value in values) for values in (used.mean, used.std, own.mean, own.std)
        )
        logger.warning(
            f"The images are normalised by mean {mean} and deviation {std}, and {source} expects mean {expected_mean} "
            f"and deviation {expected_std}; pass processor={source!r} to load_image_task."
        )


def _read(source: str, name: str) -> dict[str, Any] | None:
    path = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; it must hold the settings of an image processor.")
    return content


def _normalization(settings: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation for images from 0 to 1, whatever range the processor scales images to first."""
    # Pixels p from 0 to 255 become (p factor - offset - mean) / std.
    factor = float(settings.get("rescale_factor", 1 / 255)) * 255 if settings.get("do_rescale", True) else 255.0
    offset = 1.0 if settings.get("rescale_offset") else 0.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if settings.get("do_normalize", settings.get("image_mean") is not None):
        mean = _three(settings.get("image_mean") or IMAGENET_DEFAULT_MEAN, "image_mean")
        std = _three(settings.get("image_std") or IMAGENET_DEFAULT_STD, "image_std")
    return tuple((value + offset) / factor for value in mean), tuple(value / factor for value in std)


def _three(values: float | Sequence[float], field: str) -> tuple[float, float, float]:
    """Returns one number for each colour; a single one, as for grey images, counts for all."""
    listed = [values] if isinstance(values, int | float) else list(values)
    if len(listed) not in (1, 3):
        raise ValueError(f"{field} of the image processor is {values}; it must have 1 or 3 numbers.")
    first, second, third = (float(value) for value in (listed * 3 if len(listed) == 1 else listed))
    return first, second, third


def _image_size(settings: Mapping[str, Any]) -> int | None:
    """Returns the side of the images that leave the processor."""
    size = settings.get("crop_size" if settings.get("do_center_crop", "crop_size" in settings) else "size")
    if isinstance(size, Mapping):
        if "shortest_edge" in size:
            return int(size["shortest_edge"])
        size = (size.get("height"), size.get("width"))
    sides = {size} if isinstance(size, int | None) else set(size)
    if len(sides) != 1:
        raise ValueError(
            f"The image processor makes images of {size} pixels; the transforms of this package make squares. Give "
            "image_size, and a backbone that takes squares."
        )
    side = sides.pop()
    return None if side is None else int(side)
