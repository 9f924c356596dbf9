"""Image files as bytes that DALI decodes to exactly the pixels that Pillow gives.

DALI's CPU decoders and Pillow agree to the pixel on JPEG (baseline, progressive, gray, CMYK), PNG (gray, alpha, palette) and
WEBP, EXIF orientation included (tests/data/loaders/test_dali.py). They differ on a 16-bit PNG: DALI rounds to 8 bits, while
`read_image` takes the upper 8 bits. One file that DALI cannot decode ends its pipeline, and building another takes 50 ms on a
CPU. Pillow therefore decodes every file that is not a complete JPEG, 8-bit PNG or WEBP, and every file whose orientation is given
by XMP data alone; DALI gets these as bitmaps.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from falcon_fast.data.sources.images import read_image

_TAIL = 1024  # bytes; some cameras append a few bytes after the end of a JPEG
_BIT_DEPTH = 24  # offset of the bit depth in a PNG file


def decodes_alike(data: bytes) -> bool:
    """Check whether these bytes begin and end as a JPEG, PNG or WEBP file and contain nothing that DALI reads differently."""
    if data.startswith(b"\xff\xd8\xff"):
        return data.rfind(b"\xff\xd9", -_TAIL) > 0 and b"tiff:Orientation" not in data[:65536]
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        eight_bit = data[_BIT_DEPTH : _BIT_DEPTH + 1] != b"\x10"
        return eight_bit and data.rfind(b"IEND", -_TAIL) > 0 and data.rfind(b"eXIf") <= data.find(b"IDAT")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return len(data) >= int.from_bytes(data[4:8], "little") + 8
    return False


def bitmap(file: str | io.BytesIO) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an image file with Pillow. Return the bytes of a PPM file, uint8 (n,), and the image's (width, height).

    Raises the same errors as `read_image`.
    """
    image = read_image(file)
    header = b"P6 %d %d 255\n" % image.size
    return np.frombuffer(header + image.tobytes(), np.uint8), image.size


def encoded(path: str, size: tuple[int, int], by_pillow: bool = False) -> tuple[np.ndarray, tuple[int, int]]:
    """Return a file's bytes for DALI, uint8 (n,), and the (width, height) of the upright image.

    Args:
        path: the file.
        size: (width, height) of the upright image, as its header gave it before.
        by_pillow: let Pillow decode it; for a file that DALI has failed to decode.

    Raises Pillow's errors if the file is visibly damaged.
    """
    data = Path(path).read_bytes()
    if by_pillow or not decodes_alike(data):
        return bitmap(io.BytesIO(data))
    return np.frombuffer(data, np.uint8), size
