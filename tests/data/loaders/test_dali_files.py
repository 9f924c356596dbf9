"""Which files DALI decodes itself, and which it gets as bitmaps that Pillow decoded."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from falcon_fast.data.loaders.dali_files import decodes_alike, encoded
from falcon_fast.data.loaders.dali_pipeline import build_pipeline
from falcon_fast.data.sources.decoding import decode, header_size, read_image
from falcon_fast.data.sources.disk import BadImage

from ..images import CPU, damage, write_every_kind
from ..odd_images import BAD_EXIF, bad_files, chunk, good_files, with_chunk
from ..odd_images import encoded as saved

# Pillow decodes what DALI would show differently, or not at all; DALI decodes the rest.
BY_PILLOW = {
    "xmp.jpg",  # an orientation in XMP data alone
    "cmyk.jpg",
    "16-bit.png",
    "16-bit-rgb.png",
    "16-bit.tif",
    "rgb.tif",
    "exif-8.tif",
    "rgb.bmp",
    "rgb.ppm",
    "gray.pgm",
}


def test_dali_gets_files_as_they_are_or_pillows_pixels(tmp_path: Path) -> None:
    paths = write_every_kind(tmp_path)
    assert {path.name for path in paths if not decodes_alike(path.read_bytes())} == BY_PILLOW
    for path in paths:
        size = header_size(path)
        data, found = encoded(path.read_bytes(), size)
        assert data.dtype == np.uint8 and found == size
        if path.name not in BY_PILLOW:
            assert data.tobytes() == path.read_bytes()
        for given in (data, encoded(path.read_bytes(), size, by_pillow=True)[0]) if path.name in BY_PILLOW else ():
            assert given.tobytes().startswith(b"P6 ")
            assert np.array_equal(np.asarray(decode(given.tobytes())), np.asarray(read_image(str(path))))


@pytest.mark.parametrize("kind", ["truncated", "empty", "html", "gif"])
@pytest.mark.parametrize("name", ["420.jpeg", "rgb.png", "lossless.webp"])
def test_a_visibly_damaged_file_is_pillows_to_refuse(kind: str, name: str, tmp_path: Path) -> None:
    path = next(path for path in write_every_kind(tmp_path) if path.name == name)
    size = header_size(path)
    damage(path, kind)
    assert not decodes_alike(path.read_bytes())
    with pytest.raises(BadImage):
        encoded(path.read_bytes(), size)


# Of the odd but good files, those that DALI decodes itself.
PLAIN = {
    "progressive.jpg",
    "png-named.jpg",
    "jpeg-named.png",
    "one-pixel.png",
    "one-pixel.jpg",
    "thin.png",
    "bad-icc.png",
    "bad-text.png",
    "big-text.png",
    "pixels-checksum.png",
    "transparent.png",
    "gray-alpha.png",
}


def test_pillow_decodes_every_file_that_is_not_plain() -> None:
    assert {name for name, data in good_files().items() if decodes_alike(data)} == PLAIN
    assert {name for name, (data, _) in bad_files().items() if decodes_alike(data)} == {"broken-pixels.png"}


def test_a_file_of_too_many_pixels_is_no_work_for_dali() -> None:
    for name in ("progressive.jpg", "png-named.jpg"):
        data = good_files()[name]
        assert decodes_alike(data, 61 * 45) and not decodes_alike(data, 61 * 45 - 1)
    for options in ({}, {"lossless": True}, {"exif": Image.Exif()}):
        data = saved(Image.new("RGB", (61, 45), "orange"), "WEBP", **options)
        assert decodes_alike(data, 61 * 45) and not decodes_alike(data, 61 * 45 - 1)


def test_an_orientation_that_programs_read_differently_is_pillows() -> None:
    def exif(entries: list[tuple[int, int, int, int]]) -> bytes:
        body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
        return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)

    image, turned = Image.new("RGB", (8, 4)), (0x0112, 3, 1, 6)
    for data, plain in (
        (exif([turned]), True),
        (exif([]), True),
        (exif([(0x010F, 2, 4, 0), turned]), True),
        (exif([turned, turned]), False),
        (exif([(0x0112, 4, 1, 6)]), False),  # LONG in place of SHORT
        (exif([(0x0112, 3, 2, 6)]), False),
        (exif([(0x0112, 3, 1, 9)]), False),
        (exif([(0x0112, 3, 1, 0)]), False),
        (exif([(0x010F, 2, 400, 5000), turned]), False),  # Pillow stops at the first entry that lies outside
        (exif([(0x010F, 99, 1, 0), turned]), False),
        (BAD_EXIF, False),
        (exif([turned])[:-1], False),
    ):
        assert decodes_alike(saved(image, "JPEG", exif=b"Exif\0\0" + data)) == plain, data
        assert decodes_alike(with_chunk(saved(image, "PNG"), chunk(b"eXIf", data))) == plain, data
        assert decodes_alike(saved(image, "WEBP", exif=data)) == plain, data


def mutated(data: bytes, random: np.random.RandomState) -> bytes:
    """A damaged file. The checksums of a PNG are made right again, so that the damage is found later."""
    changed, n = bytearray(data), len(data)
    at, count = random.randint(n), random.randint(1, 60)
    kind = random.randint(6)
    if kind == 0:
        for _ in range(random.randint(1, 6)):
            changed[random.randint(n)] = random.randint(256)
    elif kind == 1:
        for _ in range(random.randint(1, 4)):
            changed[random.randint(min(n, 700))] = random.randint(256)
    elif kind == 2:
        changed[at : at + count] = bytes(count)
    elif kind == 3:
        del changed[at : n - 12]
    elif kind == 4:
        changed[at:at] = random.bytes(count)
    else:
        del changed[at : at + count]
    found = bytes(changed)
    if not found.startswith(b"\x89PNG") or random.randint(2):
        return found
    kept, at = [found[:8]], 8
    while at + 12 <= len(found):
        end = at + 12 + int.from_bytes(found[at : at + 4], "big")
        if end > len(found):
            break
        kept += [found[at : end - 4], struct.pack(">I", zlib.crc32(found[at + 4 : end - 4]))]
        at = end
    return b"".join(kept) + found[at:]


@pytest.mark.parametrize("count", [150, pytest.param(8000, marks=pytest.mark.slow)])
def test_dali_decodes_no_damaged_file_that_pillow_refuses(count: int, tmp_path: Path) -> None:
    """And what both decode has the same pixels: however a file is damaged, all loaders agree about it."""
    pytest.importorskip("nvidia.dali")
    files = [path.read_bytes() for path in write_every_kind(tmp_path)] + list(good_files().values())
    files = [data for data in files if decodes_alike(data)]
    random = np.random.RandomState(count)
    both, refused = 0, 0
    given: list[np.ndarray] = []
    for _ in range(count):
        data = mutated(files[random.randint(len(files))], random)
        if not decodes_alike(data):
            continue
        given[:] = [np.frombuffer(data, np.uint8)]
        try:
            (pixels, _) = build_pipeline(lambda: (list(given),), 1, 1, CPU, 1).run()
        except RuntimeError:  # then Pillow is asked
            refused += 1
            continue
        both += 1
        assert np.array_equal(np.from_dlpack(pixels[0]), np.asarray(decode(data)))
    assert both > count // 6 and refused > count // 20
