"""The view of evaluation: to the pixel what torchvision's Resize and CenterCrop give."""

from __future__ import annotations

import numpy as np
from PIL import Image

from falcon_fast.data.views.evaluation_view import evaluation_view

from ..images import torchvisions


def noise(width: int, height: int) -> Image.Image:
    random = np.random.RandomState(width * 1000 + height)
    small = Image.fromarray(random.randint(0, 256, (9, 9, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def evaluated(images: list[Image.Image], size: int) -> list[np.ndarray]:
    return [np.asarray(evaluation_view(image, size)) for image in images]


def test_evaluation_at_224_takes_the_middle_of_256_as_torchvision_does() -> None:
    images = [noise(512, 256), noise(256, 384), noise(600, 400), noise(333, 227), noise(128, 161), noise(256, 256)]
    for image, ours in zip(images, evaluated(images, 224), strict=True):
        assert np.array_equal(ours, torchvisions(image, 256, 224)), image.size


def test_small_views_take_the_whole_short_side() -> None:
    images = [noise(64, 32), noise(32, 48), noise(100, 50), noise(20, 20), noise(95, 95)]
    for image, ours in zip(images, evaluated(images, 32), strict=True):
        assert np.array_equal(ours, torchvisions(image, 32, 32)), image.size
    at = {size: evaluated([noise(256, 256)], size)[0] for size in (95, 96)}
    assert np.array_equal(at[95], torchvisions(noise(256, 256), 95, 95))
    assert np.array_equal(at[96], torchvisions(noise(256, 256), 110, 96))


def test_images_of_the_size_itself_are_taken_as_they_are() -> None:
    for size in (16, 224):
        assert np.array_equal(evaluated([noise(size, size)], size)[0], np.asarray(noise(size, size)))


def test_awkward_shapes_still_give_whole_views() -> None:
    images = [noise(1, 1), noise(1, 9), noise(9, 1), noise(257, 3), noise(333, 227)]
    for size in (7, 96):
        assert [view.shape for view in evaluated(images, size)] == [(size, size, 3)] * 5
