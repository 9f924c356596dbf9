"""Image files as bytes that DALI decodes to exactly the pixels that Pillow gives.

DALI's CPU decoders and Pillow agree to the pixel on JPEG (baseline, progressive, gray), PNG (gray, alpha, palette) and WEBP, EXIF
orientation included (tests/data/loaders/test_dali.py). They differ on a 16-bit PNG: DALI rounds to 8 bits, while
Pillow takes the upper 8 bits. One file that DALI cannot decode ends its pipeline, and building another takes 50 ms on a
CPU. And DALI decodes some files that Pillow refuses, or turns them where Pillow does not. Pillow therefore decodes every file
whose structure is not that of a plain, complete JPEG, 8-bit PNG or WEBP; DALI gets these as bitmaps. To check the structure of a
photograph of 110 KB takes 90 microseconds.
"""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np

from falcon_fast.data.sources.decoding import MAX_PIXELS, ORIENTATION, PNG, decode

_TAIL = 1024  # bytes; some cameras append a few bytes after the end of a JPEG
_FRAMES = (0xC0, 0xC1, 0xC2)  # of JPEG: baseline, extended and progressive, with Huffman's code
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EXIF_UNITS = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
}  # bytes of a value, by its type
# Where PNG files from some programs hold the orientation; Pillow looks there, DALI does not.
_TEXTS = (b"Raw profile type", b"XML:com.adobe.xmp")


def decodes_alike(data: bytes, max_pixels: int = MAX_PIXELS) -> bool:
    """Check whether these bytes are a plain, complete JPEG, PNG or WEBP file of at most `max_pixels` pixels.

    It contains nothing that DALI reads differently. Damage to the pixels themselves is not looked for.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _plain_jpeg(data, max_pixels)
        if data.startswith(PNG):
            return _plain_png(data, max_pixels)
        return data.startswith(b"RIFF") and data[8:12] == b"WEBP" and _plain_webp(data, max_pixels)
    except (struct.error, IndexError):
        return False


def _plain_jpeg(data: bytes, max_pixels: int) -> bool:
    """Check the segments of a JPEG file up to the end of the image.

    After the pixels DALI stops reading, while Pillow goes on to the end of the image and refuses what is damaged there.
    """
    at, exif, size, scans = 2, 0, 0, False
    while True:
        if scans:  # behind the coded pixels, in which 0xFF stands before 0 and before restart markers alone
            found = _MARKER.search(data, at)
            if found is None:
                return False
            at = found.start()
            if found[0][1] == 0xD9:  # the end of the image
                return 0 < size <= max_pixels and data.rfind(b"\xff\xd9", -_TAIL) > 0
        marker, code, length = struct.unpack_from(">BBH", data, at)
        end = at + 2 + length
        if marker != 0xFF or length < 2 or end > len(data) or not _is_plain(code):
            return False
        if code in _FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if size or precision != 8 or components not in (1, 3):  # CMYK has several meanings
                return False
            size = width * height
        elif code == 0xE1:
            segment = data[at + 4 : end]
            if segment.startswith(b"Exif\0\0"):
                exif += 1
                if exif > 1 or not _plain_exif(segment[6:]):
                    return False
            elif b"tiff:Orientation" in segment:
                return False
        scans = scans or code == 0xDA
        at = end


def _is_plain(code: int) -> bool:
    """Check whether a JPEG marker is of a frame, of Huffman or quantization tables, a scan, a restart interval, or a comment."""
    return code in _FRAMES or code in (0xC4, 0xDA, 0xDB, 0xDD, 0xFE) or 0xE0 <= code <= 0xEF


def _plain_png(data: bytes, max_pixels: int) -> bool:
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    if depth == 16 or not 0 < width * height <= max_pixels or data[12:16] != b"IHDR":
        return False
    at, pixels = len(PNG), False
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            return False
        if kind == b"IDAT":
            pixels = True
        else:
            if zlib.crc32(data[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
                return False
            if kind == b"IEND":
                return pixels and len(data) - end < _TAIL
            body = data[at + 8 : end - 4]
            if kind in (b"acTL", b"fcTL", b"fdAT") or (kind == b"eXIf" and (pixels or not _plain_exif(body))):
                return False
            if kind in (b"tEXt", b"zTXt", b"iTXt") and body.startswith(_TEXTS):
                return False
        at = end


def _plain_webp(data: bytes, max_pixels: int) -> bool:
    end = int.from_bytes(data[4:8], "little") + 8
    if len(data) != end:
        return False
    at, first = 12, data[12:16]
    if first == b"VP8X":
        if data[20] & 2:  # animated
            return False
        width, height = (1 + int.from_bytes(data[i : i + 3], "little") for i in (24, 27))
    elif first == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (int.from_bytes(data[i : i + 2], "little") & 0x3FFF for i in (26, 28))
    if not 0 < width * height <= max_pixels:
        return False
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        body = data[at + 8 : at + 8 + length]
        if len(body) < length or (kind == b"EXIF" and not _plain_exif(body)):
            return False
        if kind == b"XMP " and b"tiff:Orientation" in body:
            return False
        at += 8 + length + (length & 1)
    return at == end


def _plain_exif(data: bytes) -> bool:
    """Check that all entries of the first directory lie within the EXIF data, and that the orientation is 1 to 8, given once."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:
        return False
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    if start < 8 or start + 2 + 12 * count + 4 > len(data):
        return False
    seen = False
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number, offset = struct.unpack_from(order + "HHII", data, at)
        size = _EXIF_UNITS.get(kind, 0) * number
        if kind not in _EXIF_UNITS or (size > 4 and offset + size > len(data)):
            return False
        if tag == ORIENTATION:
            (value,) = struct.unpack_from(order + "H", data, at + 8)
            if seen or (kind, number) != (3, 1) or not 1 <= value <= 8:
                return False
            seen = True
    return True


def bitmap(
    data: bytes, max_pixels: int = MAX_PIXELS, path: str | Path = "an image"
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an image file with Pillow. Return the bytes of a PPM file, uint8 (n,), and the image's (width, height).

    Raises the same errors as `decoding.decode`, which takes the same arguments.
    """
    image = decode(data, max_pixels, path)
    header = b"P6 %d %d 255\n" % image.size
    return np.frombuffer(header + image.tobytes(), np.uint8), image.size


def encoded(
    data: bytes,
    size: tuple[int, int],
    by_pillow: bool = False,
    max_pixels: int = MAX_PIXELS,
    path: str | Path = "an image",
) -> tuple[np.ndarray, tuple[int, int]]:
    """Return bytes for DALI, uint8 (n,), and the (width, height) of the upright image.

    Args:
        data: the contents of the file.
        size: (width, height) of the upright image, as its header gave it before.
        by_pillow: let Pillow decode it; for a file that DALI has failed to decode.
        max_pixels, path: as in `decoding.decode`.

    Raises the errors of `decoding.decode` if the file is visibly damaged.
    """
    if by_pillow or not decodes_alike(data, max_pixels):
        return bitmap(data, max_pixels, path)
    return np.frombuffer(data, np.uint8), size
