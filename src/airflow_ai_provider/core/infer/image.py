"""Encoded images as numbers.

Invariants: every image keeps its place; one that cannot be decoded, or has another size, is a row error; the size is
read from the header before a pixel is decoded, so a small file cannot fill the memory.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from kornia_rs.io import decode_image_png_u8
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import numpy.typing as npt

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# as the header of a PNG file says it (8 bits, this colour type, not interlaced), and as its decoder calls it
_PLAIN_PNG = {1: (b"\x08\0\0\0\0", "mono"), 3: (b"\x08\2\0\0\0", "rgb"), 4: (b"\x08\6\0\0\0", "rgba")}
_MOST_PIXELS = 64_000_000


def decode_images(
    column: pa.ChunkedArray, shape: tuple[int, ...], options: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
    """Decode a column of encoded images (whatever format Pillow reads).

    :param column: the images' bytes.
    :param shape: channels, height, width; or height, width for one channel.
    :param options: ``resize`` (bilinear, to the model's size; without it another size is a row error), ``mean`` and
        ``std`` per channel, applied after the division by 255.
    :return: float32 in 0 … 1 (before ``mean`` and ``std``), first axis the rows; reasons by position.
    """
    channels, height, width = (1, *shape) if len(shape) == 2 else shape
    encoded = np.zeros((len(column), height, width, channels), np.uint8)
    errors: dict[int, str] = {}
    for row, value in enumerate(column):
        try:
            data = value.as_py()
            image = _plain_png(data, channels, (width, height))
            if image is None:
                image = np.asarray(_decode(data, channels, (width, height), bool(options.get("resize"))))
            encoded[row] = image.reshape(height, width, channels)
        except Exception as error:  # Pillow's readers raise what their formats' parsers raise
            errors[row] = f"bad_image: {error or type(error).__name__}"[:300]
    pixels = np.empty((len(column), channels, height, width), np.float32)
    np.divide(encoded.transpose(0, 3, 1, 2), np.float32(255), out=pixels, dtype=np.float32)
    if "mean" in options:
        pixels -= np.asarray(options["mean"], np.float32).reshape(-1, 1, 1)
    if "std" in options:
        pixels /= np.asarray(options["std"], np.float32).reshape(-1, 1, 1)
    array = pixels.reshape(len(column), *shape)
    array[list(errors)] = 0
    return array, errors


def _plain_png(data: bytes | None, channels: int, size: tuple[int, int]) -> npt.NDArray[np.uint8] | None:
    """Decode a PNG file of the model's own size and mode, in a quarter of Pillow's time; ``None`` for all else.

    What this decoder refuses is left to Pillow, which reads it or says what is wrong with it.
    """
    header, mode = _PLAIN_PNG[channels]
    head = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", *size) + header
    if not data or not data.startswith(head):
        return None
    try:
        pixels: npt.NDArray[np.uint8] = decode_image_png_u8(data, (size[1], size[0]), mode)
    except Exception:  # it has no error type of its own
        return None
    return pixels


def _decode(data: bytes | None, channels: int, size: tuple[int, int], resize: bool) -> Image.Image:
    if not data:
        raise ValueError("no bytes")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        # Pillow's own text holds an address in memory: other bytes at each run
        raise ValueError(f"no image format that Pillow knows, first bytes {data[:8]!r}") from None
    with image:
        if image.width * image.height > _MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels are more than {_MOST_PIXELS}")
        if image.size != size and not resize:
            raise ValueError(f"{image.width} × {image.height} pixels, the model takes {size[0]} × {size[1]}")
        mode = _MODES[channels]
        image.load()
        converted = image if image.mode == mode else image.convert(mode)
        return converted if converted.size == size else converted.resize(size, Image.Resampling.BILINEAR)
