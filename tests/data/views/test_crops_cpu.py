"""Crops in C++: Pillow's to the bit, at every instruction set of this processor; and Pillow where there is no extension."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from falcon_fast.data.views import crops_cpu
from falcon_fast.data.views.crops_cpu import pillow_crop, resized_crops
from falcon_fast.kernels import cpu_extension

needs_extension = pytest.mark.skipif(cpu_extension is None, reason="extension not built")
LEVELS = cpu_extension.levels() if cpu_extension else ["none"]


def random_crops(
    random: np.random.RandomState, count: int, highest: int
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Images of noise of any sizes, a box of each for either view, and flips."""
    images, boxes = [], np.empty((2, count, 4), np.int64)
    for i in range(count):
        sides = random.randint(1, highest + 1, 2)
        images.append(random.randint(0, 256, (*sides, 3)).astype(np.uint8))
        for view in range(2):
            rows, columns = random.randint(1, sides + 1)
            boxes[view, i] = random.randint(sides[0] - rows + 1), random.randint(sides[1] - columns + 1), rows, columns
    return images, boxes, random.rand(2, count) < 0.5


def rows_then_columns(pixels: np.ndarray, box: list[int], flip: bool, size: int) -> np.ndarray:
    """By Pillow, one axis after the other: which of them 13 takes first depends on the sides."""
    top, left, rows, columns = box
    region = Image.fromarray(pixels).crop((left, top, left + columns, top + rows))
    wide = region.resize((size, rows), Image.Resampling.BICUBIC)
    result = np.asarray(wide.resize((size, size), Image.Resampling.BICUBIC))
    return result[:, ::-1] if flip else result


@needs_extension
@pytest.mark.parametrize("level", LEVELS)
def test_any_region_is_pillows(level: str) -> None:
    best = cpu_extension.level()

    @given(highest=st.sampled_from([3, 20, 90, 400]), size=st.integers(1, 60), seed=st.integers(0, 9999))
    def check(highest: int, size: int, seed: int) -> None:
        images, boxes, flips = random_crops(np.random.RandomState(seed), 3, highest)
        views = resized_crops(images, boxes, flips, size, None).numpy()  # type: ignore[arg-type]
        for view in range(2):
            for i, image in enumerate(images):
                expected = rows_then_columns(image, boxes[view, i].tolist(), flips[view, i], size)
                assert np.array_equal(views[3 * view + i], expected)

    cpu_extension.use_level(level)
    try:
        check()
    finally:
        cpu_extension.use_level(best)


def test_without_the_extension_pillow_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crops_cpu, "cpu_extension", None)
    images, boxes, flips = random_crops(np.random.RandomState(0), 5, 50)
    with ThreadPoolExecutor(2) as pool:
        views = resized_crops(images, boxes, flips, 24, pool).numpy().reshape(2, 5, 24, 24, 3)
    for view, i in np.ndindex(2, 5):
        box, image = boxes[view, i].tolist(), Image.fromarray(images[i])
        assert np.array_equal(views[view, i], pillow_crop(image, box, flips[view, i], 24))


@needs_extension
@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 0, 5), (0, 0, 5, 0), (0, 0, 9, 5), (0, 0, 5, 10), (4, 0, 5, 5), (0, 5, 5, 5)],
)
def test_boxes_outside_the_image_are_refused(box: tuple[int, ...]) -> None:
    image = np.zeros((8, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="must lie within its image"):
        resized_crops([image], np.array([[box], [(0, 0, 8, 9)]]), np.zeros((2, 1), bool), 4, None)  # type: ignore[arg-type]
