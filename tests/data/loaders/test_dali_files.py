"""Which files DALI decodes itself, and which it gets as bitmaps that Pillow decoded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from falcon_fast.data.loaders.dali_files import decodes_alike, encoded
from falcon_fast.data.sources.decoding import decode, header_size, read_image
from falcon_fast.data.sources.disk import BadImage

from ..images import damage, write_every_kind

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
