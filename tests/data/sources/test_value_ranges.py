"""Images of more than 8 bits per channel: their scale, and that none becomes nearly black in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from falcon_fast.data.sources.decoding import decode, header
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.value_ranges import SCALING, lines

from ..odd_images import encoded, good_files, tiff
from .opened import folder, save


def levels(data: bytes) -> np.ndarray:
    """The gray levels of a decoded gray image."""
    pixels = np.asarray(decode(data))
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_gray_uses_the_upper_8_of_the_bits_that_it_has(bits: int, kind: str) -> None:
    values = np.linspace(0, 2**bits - 1, 60).astype(np.uint16).reshape(6, 10)
    assert np.array_equal(levels(encoded(Image.fromarray(values), kind)), values // 2 ** (bits - 8))


@pytest.mark.parametrize("bits", [12, 16, 17, 20, 24, 31, 32])
def test_integers_of_32_bits_use_the_upper_8_of_the_bits_that_they_need(bits: int) -> None:
    values = np.linspace(0, 2**bits - 1, 60).astype(np.uint32).reshape(6, 10)
    assert np.array_equal(levels(tiff(values[..., None])), values >> (bits - 8))
    if bits < 32:
        assert np.array_equal(levels(tiff(values.astype(np.int32)[..., None])), values >> (bits - 8))


def test_twelve_bits_are_twelve_bits_however_dark() -> None:
    values = np.arange(60, dtype=np.uint16).reshape(6, 10) * 10
    assert np.array_equal(levels(tiff(values[..., None], bits=12)), values >> 4)


def test_floats_from_0_to_1_are_255_times_as_much() -> None:
    values = np.linspace(0, 1, 60).astype(np.float32).reshape(6, 10)
    for data in (encoded(Image.fromarray(values), "TIFF"), tiff(values[..., None])):
        assert np.abs(levels(data) - 255.0 * values).max() <= 0.5001


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_a_range_that_the_file_states_is_used(dtype: type) -> None:
    from PIL import TiffImagePlugin

    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[340], tags[341] = (-1000, 3000) if dtype != np.float32 else (-1000.0, 3000.0)
    for tag in (340, 341):
        tags.tagtype[tag] = 11 if dtype == np.float32 else 9
    values = np.linspace(-1200, 3000, 60).round().reshape(6, 10)
    as_pillow_writes = values.astype(np.float32 if dtype == np.float32 else np.int32)
    found = levels(encoded(Image.fromarray(as_pillow_writes), "TIFF", tiffinfo=tags))
    assert np.array_equal(found, ((values.round() + 1000) / 4000 * 255).round().clip(0, 255))


@given(st.integers(1, 2**32 - 1), st.integers(0, 3), st.sampled_from(["u2", "u4", "f4"]))
def test_no_gray_image_becomes_nearly_black_in_silence(brightest: int, low: int, kind: str) -> None:
    """Either it is bright enough to be seen, or it is refused with a reason."""
    values = np.full((3, 4, 1), low)
    values[1, 1] = brightest % 2**16 if kind == "u2" else brightest
    if kind == "f4":
        values = (values / 2**32).astype("f4")
    data = tiff(values.astype(kind))
    try:
        assert levels(data).max() >= 17
    except BadImage as error:
        assert "nearly black" in str(error)
        assert float(values.max()) < 17 if kind != "f4" else float(values.max()) * 255 < 17


def test_a_black_image_stays_black() -> None:
    for kind in (np.uint16, np.int32, np.float32):
        assert levels(tiff(np.zeros((3, 4, 1), kind))).max() == 0


def test_the_folder_says_how_many_files_are_scaled_and_how(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", 100)
    for i in range(2):
        (tmp_path / f"deep-{i}.png").write_bytes(good_files()["12-in-16.png"])
    for name in (
        "float.tif",
        "rgb16.tif",
        "animated.webp",
        "12-bit.tif",
        "maximum.pgm",
        "declared.tif",
        "uint32.tif",
        "pages.tif",
    ):
        (tmp_path / name).write_bytes(good_files()[name])
    notes = folder(tmp_path).notes
    assert f"2 images with 16-bit gray: {SCALING['16-bit gray']}" in notes
    assert "1 image with floating-point gray: values from 0 to 1 are scaled to 8 bits" in notes
    assert "2 images with several frames: the first is used" in notes
    for kind in ("16-bit color", "12-bit gray", "gray of a stated maximum", "gray of a stated range", "32-bit gray"):
        assert f"1 image with {kind}: {SCALING[kind]}" in notes, kind


def test_ordinary_files_give_no_line(tmp_path: Path) -> None:
    for name in ("cmyk.jpg", "transparent.png", "lzw.tif", "one-pixel.png"):
        (tmp_path / name).write_bytes(good_files()[name])
        assert header(tmp_path / name).depth == ""
    assert lines(["", ""]) == []
