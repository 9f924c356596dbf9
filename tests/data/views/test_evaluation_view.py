"""The view of evaluation: to the pixel what torchvision's Resize and CenterCrop give."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from falcon_fast.data.views.evaluation_view import LONGEST, evaluation_view

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


@pytest.mark.parametrize(("width", "height"), [(330, 20), (20, 330), (2, 500), (500, 2), (1, 300), (900, 31)])
@pytest.mark.parametrize("size", [32, 224])
def test_long_images_are_cropped_first_and_look_the_same(width: int, height: int, size: int) -> None:
    image = noise(width, height)
    assert max(image.size) > LONGEST * min(image.size)
    expected = torchvisions(image, 256 if size == 224 else 32, size).astype(int)
    difference = np.abs(evaluated([image], size)[0] - expected)
    # Pillow may take the columns first, and rounds in between: 0.072 of 255 on average at 20 x 330 pixels.
    assert difference.max() <= 3 and difference.mean() < 0.1


@pytest.mark.parametrize("shape", [(2, 20000), (20000, 2), (1, 60000), (3200, 200), (200, 3201)])
def test_no_image_of_more_pixels_than_stated_is_made(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    resize = Image.Image.resize

    def counted(self: Image.Image, size: tuple[int, int], *arguments: object, **options: object) -> Image.Image:
        made.append(size[0] * size[1])
        return resize(self, size, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", counted)
    assert evaluation_view(Image.new("RGB", shape), 224).size == (224, 224)
    assert 0 < max(made) <= LONGEST * 256**2
