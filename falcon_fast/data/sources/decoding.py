"""Decode one image file to an upright RGB image of 8 bits, the same in every loader and tool, or say why it cannot be used.

A bad side chunk does not make an image bad: EXIF data that cannot be read is passed over, and a PNG whose text, color profile or
EXIF chunk stops Pillow is decoded without these chunks.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from falcon_fast.data.sources.disk import BadImage, file_bytes, regular_file, shown
from falcon_fast.data.sources.value_ranges import depth_of, eight_bits, refuse_black
from falcon_fast.errors import TemporaryError

if TYPE_CHECKING:
    from PIL.Image import Image

# GIF is not among them: DALI cannot read it, and all loaders read the same formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
MAX_PIXELS = 178_956_970  # width times height, as Pillow's own limit; `data.max_pixels` changes it
TOO_LARGE = "pixels are more than data.max_pixels"  # allows
ORIENTATION = 0x0112  # EXIF tag; from orientation 5 on, width and height are exchanged
TIFF_SIZE = (256, 257)
PNG = b"\x89PNG\r\n\x1a\n"
# The chunks of a PNG that make its pixels; eXIf turns them upright.
_PIXEL_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


class Header(NamedTuple):
    """What the header of a file tells. `width` and `height` are of the upright image, in pixels."""

    width: int
    height: int
    orientation: int  # of EXIF, 1 to 8
    depth: str  # what is special about the file (value_ranges.SCALING), or ""


def header(path: str | Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Return what a file's header tells, in 90 microseconds. Raises the same errors as `read_image`."""
    with _enough_memory(path), regular_file(path) as file:
        try:
            return _header(file, max_pixels)
        except BadImage:
            file.seek(0)
            if file.read(len(PNG)) != PNG:
                raise
        return _header(io.BytesIO(without_side_chunks(file_bytes(path))), max_pixels)


def header_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) of the upright image, from the file's header."""
    return header(path)[:2]


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image:
    """Decode one file to an upright RGB image.

    max_pixels: largest width times height. An image takes 4 bytes per pixel while it is decoded, and up to three times as much
        while it is converted and turned.

    Raises:
        BadImage: it is no regular file, no image, damaged, too large, of a format that is not among FORMATS, or the scale of its
            values is not known.
        TemporaryError: the disk cannot be read, or memory ran out.
    """
    return decode(file_bytes(path), max_pixels, path)


def decode(data: bytes, max_pixels: int = MAX_PIXELS, path: str | Path = "an image") -> Image:
    """Decode the contents of a file, as `read_image` does.

    path: for messages.
    """
    with _enough_memory(path):
        try:
            return _decoded(io.BytesIO(data), max_pixels)
        except BadImage as error:
            if not data.startswith(PNG) or (rest := without_side_chunks(data)) == data:
                raise
            first = error
        try:
            return _decoded(io.BytesIO(rest), max_pixels)
        except BadImage:
            raise first from None


@contextmanager
def _enough_memory(path: str | Path) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise TemporaryError(
            f"memory ran out while {shown(path)} was decoded: give more memory, fewer data.workers, or a smaller data.max_pixels"
        ) from None


@contextmanager
def _opened(file: BinaryIO, max_pixels: int) -> Iterator[Image]:
    """Open an image with Pillow. What Pillow raises, here and in the block, becomes BadImage, except for errors of the disk."""
    from PIL import Image, UnidentifiedImageError

    try:
        if max_pixels > MAX_PIXELS and max_pixels > 2 * (Image.MAX_IMAGE_PIXELS or max_pixels):
            Image.MAX_IMAGE_PIXELS = max_pixels // 2 + 1  # Pillow refuses twice this number; it is only ever raised
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(_too_large(f"{width} x {height}", max_pixels))
            yield image
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise BadImage(what_is_there(file)) from None
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        raise BadImage(_too_large(f"{int(count[0]):,}" if count else "its", max_pixels)) from None
    except Exception as error:  # Pillow's decoders raise many types
        if isinstance(error, OSError) and error.errno is not None:
            raise
        if "out of memory" in str(error) and not _begins(file, b"II", b"MM"):  # a crafted TIFF causes it, too
            raise MemoryError from None
        raise BadImage(reason_of(error)) from None


def _too_large(count: str, max_pixels: int) -> str:
    return f"{count} {TOO_LARGE} {max_pixels:,} allows: raise it, or reduce the image"


def _header(file: BinaryIO, max_pixels: int) -> Header:
    with _opened(file, max_pixels) as image:
        width, height = image.size
        depth = depth_of(image)
        if image.format == "TIFF":  # newer versions of Pillow have applied the orientation already, older ones have not
            width, height = (image.tag_v2[tag] for tag in TIFF_SIZE)  # type: ignore[attr-defined]
        # For a PNG without EXIF, Pillow's getexif would decode all pixels to search for a chunk behind them.
        elif not any(word in str(key).lower() for key in image.info for word in ("exif", "xmp")):
            return Header(width, height, 1, depth)
        orientation = _orientation(image)
        return Header(*((height, width) if orientation >= 5 else (width, height)), orientation, depth)


def _orientation(image: Image) -> int:
    """Return the EXIF orientation of an image, 1 if its EXIF data cannot be read."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # Pillow raises many types on damaged EXIF data
        return 1
    return int(value) if value in range(1, 9) else 1


def _decoded(file: BinaryIO, max_pixels: int) -> Image:
    from PIL.Image import Transpose

    with _opened(file, max_pixels) as image:
        depth = depth_of(image)
        image.load()
        orientation = _orientation(image)  # 1 for a TIFF, which Pillow 13 turns itself
        result: Image = image
        if image.mode == "F" or image.mode.startswith("I"):
            result = eight_bits(image, depth)
        elif image.mode in ("RGBa", "La"):  # multiplied by alpha
            result = image.convert(image.mode.upper())
        elif image.mode == "P" and "transparency" in image.info:  # converted directly, Pillow would warn for each image
            result = image.convert("RGBA")
        result = result.convert("RGB")
        if depth == "16-bit color":
            refuse_black(result, None, depth)
        turns = (
            Transpose.FLIP_LEFT_RIGHT,
            Transpose.ROTATE_180,
            Transpose.FLIP_TOP_BOTTOM,
            Transpose.TRANSPOSE,
            Transpose.ROTATE_270,
            Transpose.TRANSVERSE,
            Transpose.ROTATE_90,
        )
        return result if orientation == 1 else result.transpose(turns[orientation - 2])


def without_side_chunks(data: bytes) -> bytes:
    """Return a PNG with the chunks alone that make its pixels, and with eXIf where its checksum is right."""
    kept, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        critical = not kind[:1].islower()
        whole = (
            zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end], "big")
            if kind == b"eXIf"
            else critical
        )
        if end > len(data) or kind == b"tRNS" or whole:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _begins(file: BinaryIO, *starts: bytes) -> bool:
    """Check whether a file begins with one of these bytes."""
    file.seek(0)
    return file.read(16).startswith(starts)


# What a file begins with, at an offset, and what it then is.
_OTHERS = (
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (4, b"ftypavi", "an AVIF image"),
    (4, b"ftyphe", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftypmsf1", "a HEIF image"),
    (4, b"ftyp", "a video"),
    (0, b"8BPS", "a Photoshop file"),
    (0, b"\0\0\1\0", "an icon"),
    (0, b"%PDF", "a PDF document"),
    (128, b"DICM", "a DICOM file"),
    (0, b"SIMPLE  =", "a FITS file"),
    (0, b"\x89HDF", "an HDF5 file"),
    (0, b"\x93NUMPY", "a NumPy file"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip file"),
)
_NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers"}


def what_is_there(file: BinaryIO) -> str:
    """Return in one line what a file is that Pillow does not recognise as an image of one of the FORMATS."""
    file.seek(0)
    start = file.read(4096)
    if not start:
        return "the file is empty"
    if not start.strip(b"\0"):
        return "the file begins with zeros alone"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return f"{_gif(file)}, which is not read: convert it to PNG"
    if start.startswith((b"II", b"MM")) and (layout := _tiff_layout(file)):
        return layout
    for at, magic, name in _OTHERS:
        if start[at:].startswith(magic):
            return f"{name}, which is not read" + (": convert it to PNG or JPEG" if "image" in name else "")
    if start.startswith(b"\xff\xd8\xff") and (layout := _jpeg_layout(start)):
        return layout
    for magic, name in ((b"\xff\xd8\xff", "JPEG"), (PNG, "PNG"), (b"RIFF", "WEBP"), (b"BM", "BMP")):
        if start.startswith(magic):
            return f"the header of this {name} file is damaged"
    if not start.translate(None, bytes(range(32, 127)) + b"\t\n\r\f"):
        return "text, not an image"
    return "not an image of a known format"


def _jpeg_layout(start: bytes) -> str:
    """Return what is special about a JPEG file that Pillow cannot read, or ""."""
    at = 2
    while at + 5 <= len(start) and start[at] == 0xFF:
        code = start[at + 1]
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            lossless = code in (0xC3, 0xC7, 0xCB, 0xCF)
            kind = "lossless " if lossless else "hierarchical " if code in (0xC5, 0xC6, 0xCD, 0xCE) else ""
            if kind or start[at + 4] != 8:
                return f"a {kind}JPEG image of {start[at + 4]} bits per channel, which is not read: convert it to PNG"
            return ""
        at += 2 + int.from_bytes(start[at + 2 : at + 4], "big")
    return ""


def _gif(file: BinaryIO) -> str:
    from PIL import Image

    file.seek(0)
    try:
        with Image.open(file, formats=("GIF",)) as image:
            return "an animated GIF image" if getattr(image, "is_animated", False) else "a GIF image"
    except Exception:  # Pillow's decoders raise many types
        return "a damaged GIF image"


def _tiff_layout(file: BinaryIO) -> str:
    """Return which bands a TIFF file has, where Pillow cannot read them; "" if its directory cannot be read."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    big = _begins(file, b"II+", b"MM\0+")
    file.seek(0)
    try:
        directory = ImageFileDirectory_v2(file.read(16 if big else 8))
        file.seek(directory.next)
        directory.load(file)
        bits, bands = directory.get(258, (1,)), directory.get(277, 1)
        numbers = _NUMBERS.get(directory.get(339, (1,))[0], "numbers of another kind")
        layout = f"a TIFF image of {int(bands)} band{'s' if bands != 1 else ''} of {int(max(bits))}-bit {numbers}"
    except Exception:  # a damaged directory raises many types
        return ""
    return f"{layout}, which is not read: save 1 band of 8, 16 or 32 bits, or 3 or 4 bands of 8 or 16 bits of unsigned integers"


def reason_of(error: BaseException) -> str:
    """Return in one line what was wrong with a file."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.isprintable() else repr(text)
