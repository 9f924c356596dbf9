"""Image files as bytes that DALI decodes to the very pixels that Pillow does.

DALI's CPU decoders and Pillow agree to the pixel on JPEG (baseline, progressive, gray, CMYK), PNG (gray, alpha, palette) and
WEBP, EXIF orientation included (tests/data/loaders/test_dali.py). From a 16-bit PNG, DALI rounds to 8 bits, while `read_image`
takes the upper 8. One file that DALI cannot decode ends its pipeline, and building another takes 50 ms on a CPU. Pillow therefore
decodes every file that is not a complete JPEG, 8-bit PNG or WEBP, and every file whose orientation is given by XMP data alone;
DALI gets these as bitmaps.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from falcon_fast.data.sources.images import read_image

_TAIL = 1024  # bytes: some cameras leave a little behind the end of a JPEG
_BIT_DEPTH = 24  # its place in a PNG


def complete(data: bytes) -> bool:
    """Whether these bytes begin and end as a JPEG, PNG or WEBP file, with nothing in them that DALI takes in another way."""
    if data.startswith(b"\xff\xd8\xff"):
        return data.rfind(b"\xff\xd9", -_TAIL) > 0 and b"tiff:Orientation" not in data[:65536]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        eight_bit = data[_BIT_DEPTH : _BIT_DEPTH + 1] != b"\x10"
        return eight_bit and data.rfind(b"IEND", -_TAIL) > 0 and data.rfind(b"eXIf") <= data.find(b"IDAT")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return False


def bitmap(file: str | io.BytesIO) -> tuple[np.ndarray, tuple[int, int]]:
    """An image file decoded by Pillow, as the bytes of a PPM, uint8 (n,), and its (width, height). Raises as `read_image`."""
    image = read_image(file)
    header = b"P6 %d %d 255\n" % image.size
    return np.frombuffer(header + image.tobytes(), np.uint8), image.size


def encoded(path: str, size: tuple[int, int], by_pillow: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """A file's bytes for DALI, uint8 (n,), and the (width, height) of the upright image, which `size` says beforehand.

    Raises Pillow's errors where the file is visibly damaged. What DALI finds damaged only when it decodes is asked for again,
    `by_pillow`.
    """
    data = Path(path).read_bytes()
    if by_pillow or not complete(data):
        return bitmap(io.BytesIO(data))
    return np.frombuffer(data, np.uint8), size
