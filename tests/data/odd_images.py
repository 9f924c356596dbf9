"""Files as people have them: odd but good images, and files that are none, with the reason that must be given."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from .images import sixteen_bit_png, smooth

PNG_HEADER = 33  # bytes: the signature and the chunk IHDR
BAD_EXIF = b"\0\x08\0\x02\x01\x12\0\x03"  # it has no TIFF header


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, body: bytes, right: bool = True) -> bytes:
    """A chunk of a PNG, with the right checksum or a wrong one."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) ^ (not right))


def with_chunk(png: bytes, new: bytes) -> bytes:
    """A PNG with another chunk behind its header."""
    return png[:PNG_HEADER] + new + png[PNG_HEADER:]


def tiff(values: np.ndarray, photometric: int = 1, bits: int = 0) -> bytes:
    """An uncompressed TIFF of any number of bands of any type. values: (H, W, bands).  bits: 12 to pack a single band."""
    height, width, bands = values.shape
    pixels, kind = values.tobytes(), {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    if bits == 12:
        rows = [np.unpackbits(row.astype(">u2").view(np.uint8).reshape(-1, 2), axis=1)[:, 4:] for row in values[..., 0]]
        pixels = b"".join(np.packbits(row).tobytes() for row in rows)
    start = 512
    tags: list[tuple[int, str, list[int]]] = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [bits or 8 * values.itemsize] * bands),
        (259, "H", [1]),
        (262, "H", [photometric]),
        (273, "I", [start]),
        (277, "H", [bands]),
        (278, "H", [height]),
        (279, "I", [len(pixels)]),
        (339, "H", [kind] * bands),
    ]
    entries, extra, at = b"", b"", 8 + 2 + 12 * len(tags) + 4
    for tag, letter, numbers in tags:
        body = struct.pack(f"<{len(numbers)}{letter}", *numbers)
        if len(body) > 4:
            body, extra = struct.pack("<I", at + len(extra)), extra + body
        entries += struct.pack("<HHI", tag, {"H": 3, "I": 4}[letter], len(numbers)) + body.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + extra
    return head.ljust(start, b"\0") + pixels


def good_files(width: int = 61, height: int = 45) -> dict[str, bytes]:
    """Odd files that are images all the same: name -> contents."""
    image = smooth(width, height)
    gray = np.asarray(image.convert("L")).astype(np.uint16)
    low = np.random.RandomState(1).randint(0, 256, gray.shape).astype(np.uint16)
    png, jpeg = encoded(image, "PNG"), encoded(image, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    odd_exif = exif.tobytes()
    declared = TiffImagePlugin.ImageFileDirectory_v2()
    declared[340], declared[341] = 0, 1000
    palette = image.quantize(64)
    return {
        "progressive.jpg": encoded(image, "JPEG", progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK"), "JPEG"),
        "png-named.jpg": png,
        "jpeg-named.png": jpeg,
        "one-pixel.png": encoded(Image.new("RGB", (1, 1), "orange"), "PNG"),
        "one-pixel.jpg": encoded(Image.new("RGB", (1, 1), "orange"), "JPEG"),
        "thin.png": encoded(smooth(2, 2000), "PNG"),
        "bad-exif.png": with_chunk(png, chunk(b"eXIf", BAD_EXIF)),
        "bad-icc.png": with_chunk(png, chunk(b"iCCP", b"x\0\0junk")),
        "bad-text.png": with_chunk(png, chunk(b"iTXt", b"\0")),
        "big-text.png": with_chunk(png, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))),
        "text-checksum.png": with_chunk(png, chunk(b"tEXt", b"a\0b", right=False)),
        "exif-checksum.png": with_chunk(png, chunk(b"eXIf", odd_exif[6:], right=False)),
        "pixels-checksum.png": png.replace(chunk(b"IEND", b""), b"")[:-4] + bytes(4) + chunk(b"IEND", b""),
        "exif-in-text.png": with_chunk(
            png,
            chunk(
                b"zTXt",
                b"Raw profile type exif\0\0" + zlib.compress(f"\nexif\n{len(odd_exif)}\n{odd_exif.hex()}\n".encode()),
            ),
        ),
        "bad-exif.jpg": encoded(image, "JPEG", exif=b"Exif\0\0" + BAD_EXIF),
        "cut-exif.jpg": encoded(image, "JPEG", exif=odd_exif[:-3]),
        "bad-exif.webp": encoded(image, "WEBP", exif=BAD_EXIF),
        "animated.webp": encoded(image, "WEBP", save_all=True, append_images=[smooth(width, height, 1)], duration=9),
        "animated.png": encoded(image, "PNG", save_all=True, append_images=[smooth(width, height, 1)]),
        "pages.tif": encoded(image, "TIFF", save_all=True, append_images=[smooth(width, height, 1)]),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": encoded(image, "TIFF", compression="jpeg"),
        "transparent.png": encoded(palette, "PNG", transparency=3),
        "gray-alpha.png": encoded(image.convert("LA"), "PNG"),
        "12-in-16.png": encoded(Image.fromarray(gray * 16 + low // 16), "PNG"),
        "12-in-16.tif": encoded(Image.fromarray(gray * 16 + low // 16), "TIFF"),
        "big-endian.tif": encoded(Image.fromarray((gray * 256 + low).astype(">u2")), "TIFF"),
        "12-bit.tif": tiff((gray * 16 + low // 16)[..., None], bits=12),
        "int32.tif": encoded(Image.fromarray(gray.astype(np.int32) * 4096), "TIFF"),
        "uint32.tif": tiff((gray.astype(np.uint32) << 24)[..., None]),
        "int16.tif": tiff((gray * 100).astype(np.int16)[..., None]),
        "declared.tif": encoded(Image.fromarray((gray * 3).astype(np.int32)), "TIFF", tiffinfo=declared),
        "float.tif": encoded(Image.fromarray((gray / 255).astype(np.float32)), "TIFF"),
        "float-lzw.tif": encoded(Image.fromarray((gray / 255).astype(np.float32)), "TIFF", compression="tiff_lzw"),
        "rgb16.tif": tiff((np.asarray(image).astype(np.uint16) << 8), 2),
        "maximum.pgm": b"P5 %d %d 4095\n" % (width, height) + (gray * 16).astype(">u2").tobytes(),
    }


def bad_files(width: int = 61, height: int = 45) -> dict[str, tuple[bytes, str]]:
    """Files that no loader shows: name -> contents, and a part of the reason."""
    image = smooth(width, height)
    gray = np.asarray(image.convert("L")).astype(np.float32)
    png, jpeg, webp = (encoded(image, kind) for kind in ("PNG", "JPEG", "WEBP"))
    dark = (np.asarray(image).astype(np.uint16)) << 4
    return {
        "truncated.jpg": (jpeg[:-200], "truncated"),
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated.webp": (webp[: len(webp) // 2], ""),
        "broken.jpg": (jpeg[:400] + b"\xff\xc8\xff\xd9" + jpeg[400:], ""),
        "broken-pixels.png": (
            png[:PNG_HEADER] + chunk(b"IDAT", b"\x78\x9c" + bytes(range(90))) + chunk(b"IEND", b""),
            "",
        ),
        "checksum.png": (png[:29] + b"\0\0\0\0" + png[33:], ""),
        "12-bit.jpg": (
            jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c"),
            "a JPEG image of 12 bits per channel",
        ),
        "lossless.jpg": (jpeg.replace(b"\xff\xc0\0\x11", b"\xff\xc3\0\x11"), ""),
        "empty.jpg": (b"", "the file is empty"),
        "zeros.jpg": (bytes(3000), "zeros"),
        "text.jpg": (b"<html><title>404</title></html>", "text, not an image"),
        "noise.jpg": (bytes(range(256)), "not an image of a known format"),
        "still.gif": (encoded(image, "GIF"), "a GIF image, which is not read: convert it to PNG"),
        "moving.gif": (encoded(image, "GIF", save_all=True, append_images=[smooth(9, 9, 1)]), "an animated GIF image"),
        "gif-named.jpg": (encoded(image, "GIF"), "a GIF image"),
        "avif-named.jpg": (bytes(4) + b"ftypavif" + bytes(90), "an AVIF image, which is not read"),
        "heic-named.jpg": (bytes(4) + b"ftypheic" + bytes(90), "a HEIC image, which is not read"),
        "two-bands.tif": (tiff(np.zeros((4, 5, 2), np.uint8)), "2 bands of 8-bit unsigned integers"),
        "five-bands.tif": (tiff(np.ones((4, 5, 5), np.uint16)), "5 bands of 16-bit unsigned integers"),
        "float-bands.tif": (tiff(np.ones((4, 5, 3), np.float32), 2), "3 bands of 32-bit floating-point"),
        "float64.tif": (tiff(np.ones((4, 5, 1), np.float64)), "1 band of 64-bit floating-point"),
        "float-255.tif": (encoded(Image.fromarray(gray), "TIFF"), "only those from 0 to 1 have a known scale"),
        "float-dark.tif": (encoded(Image.fromarray(gray / 25500), "TIFF"), "nearly black"),
        "float-nan.tif": (encoded(Image.fromarray(gray * np.float32("nan")), "TIFF"), "NaN"),
        "negative.tif": (tiff(gray.astype(np.int16)[..., None] - 300), "the scale of negative values is not known"),
        "rgb-12-in-16.png": (sixteen_bit_png(dark), "nearly black"),
        "rgb-12-in-16.tif": (tiff(dark, 2), "nearly black"),
        "rgb-12-in-16.ppm": (b"P6 %d %d 65535\n" % (width, height) + dark.astype(">u2").tobytes(), "nearly black"),
        "large.png": (
            encoded(Image.new("1", (20000, 9000)), "PNG"),
            "180,000,000 pixels are more than data.max_pixels",
        ),
    }


def special_files(root: Path) -> dict[str, str]:
    """Make files with names of images that must not be opened, and links to them: name -> a part of the reason."""
    os.mkfifo(root / "fifo.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root)  # the path of a socket has at most 107 bytes
        try:
            server.bind("socket.jpg")
        finally:
            os.chdir(here)
    for name, target in (
        ("linked-fifo.jpg", "fifo.jpg"),
        ("device.jpg", "/dev/zero"),
        ("loop.jpg", "loop.jpg"),
        ("dangling.jpg", "nowhere.jpg"),
    ):
        (root / name).symlink_to(target)
    return {
        "fifo.jpg": "a FIFO, not a file",
        "linked-fifo.jpg": "a FIFO, not a file",
        "socket.jpg": "a socket, not a file",
        "device.jpg": "a device, not a file",
        "loop.jpg": "too many levels of symbolic links",
        "dangling.jpg": "no such file",
    }
