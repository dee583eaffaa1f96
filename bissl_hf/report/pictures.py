"""Pictures that are part of the page itself."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image


def png_uri(pixels: np.ndarray, *, largest: int = 128) -> str:
    """Returns an image as a data URI of a PNG; one larger than `largest` is made smaller.

    Args:
        pixels (`np.ndarray`): uint8, shape `(3, height, width)`.
        largest (`int`, *optional*, defaults to 128): longer side of the result at most, in pixels.

    Raises:
        `ValueError`: for another type or shape.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(
            f"`pixels` is {pixels.dtype} of shape {pixels.shape}; it must be uint8 of shape (3, height, width)."
        )
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    image.thumbnail((largest, largest))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri(file.getvalue(), "image/png")


def file_uri(path: Path) -> str:
    """Returns a PNG file as a data URI."""
    return data_uri(path.read_bytes(), "image/png")


def data_uri(content: bytes, media_type: str) -> str:
    """Returns bytes as a URI that holds them."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
