"""Decoding files to upright RGB, and what is said of files that are no images."""

from __future__ import annotations

import io
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from falcon_fast.data.sources import decoding
from falcon_fast.data.sources.decoding import decode, header, read_image, reason_of, without_side_chunks
from falcon_fast.data.sources.disk import BadImage

from ..images import smooth
from ..odd_images import BAD_EXIF, bad_files, chunk, encoded, good_files, special_files, with_chunk
from .opened import folder


@pytest.fixture
def rgb() -> np.ndarray:
    return np.random.RandomState(1).randint(0, 256, (6, 9, 3)).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(orientation: int, rgb: np.ndarray, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "x.png", exif=exif)
    upright = {  # what the EXIF standard says the first row and the first column are
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb, 1),
    }[orientation]
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "x.png"))), upright)


def test_every_kind_of_image_becomes_rgb(rgb: np.ndarray, tmp_path: Path) -> None:
    gray = rgb[..., 0]
    as_gray = np.repeat(gray[..., None], 3, 2)
    deep = np.random.RandomState(2).randint(0, 65536, gray.shape).astype(np.uint16)
    palette = Image.fromarray(rgb).quantize(64)
    opacity = bytes(range(64))
    kinds: dict[str, tuple[Image.Image, dict[str, Any], np.ndarray]] = {
        "rgb.png": (Image.fromarray(rgb), {}, rgb),
        "rgb.bmp": (Image.fromarray(rgb), {}, rgb),
        "rgb.ppm": (Image.fromarray(rgb), {}, rgb),
        "rgb.webp": (Image.fromarray(rgb), {"lossless": True}, rgb),
        "gray.png": (Image.fromarray(gray), {}, as_gray),
        "gray.pgm": (Image.fromarray(gray), {}, as_gray),
        "gray-alpha.png": (Image.merge("LA", [Image.fromarray(gray)] * 2), {}, as_gray),
        "rgba.png": (Image.fromarray(np.dstack([rgb, np.full_like(gray, 200)])), {}, rgb),
        "palette.png": (palette, {}, np.asarray(palette.convert("RGB"))),
        "palette-alpha.png": (palette, {"transparency": opacity}, np.asarray(palette.convert("RGB"))),
        "bits.png": (Image.fromarray(gray > 127), {}, np.where(as_gray > 127, 255, 0)),
        "deep.png": (Image.fromarray(deep), {}, np.repeat((deep // 256)[..., None], 3, 2)),
        "deep.tif": (Image.fromarray(deep), {}, np.repeat((deep // 256)[..., None], 3, 2)),
        "deeper.tif": (Image.fromarray(np.full((4, 4), 10**6, np.int32)), {}, np.full((4, 4, 3), 10**6 >> 12)),
        "cmyk.tif": (Image.new("CMYK", (4, 4), (255, 0, 0, 0)), {}, np.full((4, 4, 3), (0, 255, 255))),
    }
    for name, (image, options, expected) in kinds.items():
        image.save(tmp_path / name, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = read_image(str(tmp_path / name))
        assert read.mode == "RGB", name
        assert np.array_equal(np.asarray(read), expected), name
    source = folder(tmp_path)
    assert len(source.train.images) + len(source.test.images) == len(kinds)


def test_reasons_are_one_line() -> None:
    assert reason_of(OSError("two\n lines")) == "two lines" and reason_of(ValueError()) == "ValueError"


def test_the_header_agrees_with_the_decoded_image_on_odd_files(tmp_path: Path) -> None:
    for name, contents in good_files().items():
        path = tmp_path / name
        path.write_bytes(contents)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of damaged EXIF data
            found, image = header(path), read_image(path)
        assert image.mode == "RGB" and found[:2] == image.size, name
        assert np.asarray(image).max() > 60, name


def test_each_bad_file_has_a_reason_that_says_what_is_there(tmp_path: Path) -> None:
    expected = {name: reason for name, (_, reason) in bad_files().items()} | special_files(tmp_path)
    for name, (contents, _) in bad_files().items():
        (tmp_path / name).write_bytes(contents)
    for name, reason in expected.items():
        with pytest.raises(BadImage) as caught:
            read_image(tmp_path / name)
        text = str(caught.value)
        assert reason in text and text.isprintable() and str(tmp_path) not in text, name
        found: object = "read"
        try:
            found = header(tmp_path / name)
        except BadImage as error:  # then for the same reason
            assert str(error) == text, name
        assert name.endswith(("jpg", "png", "webp", "tif", "ppm")) or found == "read"


def test_a_png_is_used_whatever_its_side_chunks_hold() -> None:
    image = smooth(20, 15)
    png = encoded(image, "PNG")
    for kind in (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"pHYs", b"gAMA", b"tIME", b"cHRM", b"sRGB", b"acTL"):
        for body in (b"", b"1", b"x\0\0junk", BAD_EXIF, bytes(range(256))):
            for right in (True, False):
                found = decode(with_chunk(png, chunk(kind, body, right)))
                assert np.array_equal(np.asarray(found), np.asarray(image)), (kind, body, right)


def test_a_png_that_stops_pillow_still_stands_upright() -> None:
    """The EXIF chunk is good, the text chunk beside it is not."""
    exif = Image.Exif()
    exif[0x0112] = 6
    png = with_chunk(encoded(smooth(20, 15), "PNG", exif=exif), chunk(b"iTXt", b"a", right=False))
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(png), formats=("PNG",))
    assert decode(png).size == (15, 20)
    assert b"iTXt" not in without_side_chunks(png) and b"eXIf" in without_side_chunks(png)


def test_the_largest_number_of_pixels_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth(30, 20).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", 600).size == (30, 20)
    for function in (read_image, header):
        with pytest.raises(BadImage, match=r"30 x 20 pixels are more than data\.max_pixels 599 allows: raise it"):
            function(tmp_path / "x.png", 599)
    # Pillow has a limit of its own, which a larger setting raises.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 200)
    with pytest.raises(BadImage, match=r"600 pixels are more than data\.max_pixels 200 allows"):
        read_image(tmp_path / "x.png", 200)
    assert read_image(tmp_path / "x.png", 600).size == (30, 20)


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    special_files(tmp_path)
    done = threading.Event()

    def look() -> None:
        for name in ("fifo.jpg", "linked-fifo.jpg"):
            with pytest.raises(BadImage):
                read_image(tmp_path / name)
        done.set()

    threading.Thread(target=look, daemon=True).start()
    assert done.wait(60)
