"""Decoding files to upright RGB, and the split that holds images out."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from falcon_fast.data.sources.images import ImageArray, Split, held_out, read_image, reason_of

from .opened import folder


@given(st.lists(st.integers(0, 6), min_size=2, max_size=200), st.booleans())
def test_a_tenth_is_held_out_and_every_label_gives_its_share(values: list[int], labelled: bool) -> None:
    labels = np.array(values, np.int64) if labelled else None
    n = len(values)
    kept, out = held_out(labels, n, 0.1)
    assert sorted([*kept.tolist(), *out.tolist()]) == list(range(n))
    assert kept.tolist() == sorted(kept.tolist()) and out.tolist() == sorted(out.tolist())
    assert len(out) == max(1, round(n / 10)) and len(kept) >= 1
    if labels is not None:
        for label, size in Counter(values).items():
            given_up = int((labels[out] == label).sum())
            assert size // 10 <= given_up <= size // 10 + 1
    again = held_out(labels, n, 0.1)
    assert np.array_equal(again[0], kept) and np.array_equal(again[1], out)


def test_the_larger_remainders_give_first_and_lonely_images_last() -> None:
    labels = np.repeat(np.arange(4), [9, 5, 5, 1])
    _, out = held_out(labels, 20, 0.1)  # two of: .9, .5, .5, .1
    assert sorted(labels[out].tolist()) in ([0, 1], [0, 2])
    labels = np.repeat(np.arange(6), [10, 1, 1, 1, 1, 1])
    _, out = held_out(labels, 15, 0.1)
    assert labels[out].tolist() == [0, 0]


def test_the_held_out_images_are_drawn_not_the_last() -> None:
    _, out = held_out(None, 1000, 0.1)
    assert out[0] < 100 < 900 < out[-1] and 400 < out.mean() < 600


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
        "deeper.tif": (Image.fromarray(np.full((4, 4), 10**6, np.int32)), {}, np.full((4, 4, 3), 255)),
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


def test_reasons_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    with pytest.raises(OSError) as caught:
        Image.open(tmp_path / "x.jpg")
    assert reason_of(caught.value) == "not an image of a known format"
    assert reason_of(OSError("two\n lines")) == "two lines" and reason_of(ValueError()) == "ValueError"
    assert reason_of(FileNotFoundError(2, "No such file", "x")) == "no such file"


def test_a_split_without_its_bad_images_keeps_the_others_in_order() -> None:
    whole = Split(ImageArray(np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)), np.array([4, 3, 2, 1, 0]))
    assert whole.without({}) is whole
    rest = whole.without([3, 0])
    assert rest.labels is not None and rest.labels.tolist() == [3, 2, 0]
    assert [rest.images.name(i) for i in range(3)] == ["image 1", "image 2", "image 4"]
    for i, index in enumerate((1, 2, 4)):
        assert np.array_equal(np.asarray(rest.images.image(i)), np.asarray(whole.images.image(index)))
    assert Split(whole.images, None).without([1]).labels is None
