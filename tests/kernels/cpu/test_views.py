"""The photometric stage in C++ against the eager reference, at every instruction set of this processor."""

from __future__ import annotations

import dataclasses
from itertools import permutations

import numpy as np
import pytest
import torch

from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.data.views.photometric import augment, normalize, to_tensors
from falcon_fast.data.views.photometric_stage import cpu_stage
from falcon_fast.kernels import cpu_extension
from falcon_fast.kernels.cpu.views import DTYPES

from ...data.views.colours import EVERYTHING, MEAN, STD, drawn, off, photos

pytestmark = pytest.mark.skipif(cpu_extension is None, reason="extension not built")
LEVELS = cpu_extension.levels() if cpu_extension else []
CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=LEVELS, autouse=True)
def level(request: pytest.FixtureRequest):
    best = cpu_extension.level()
    cpu_extension.use_level(request.param)
    yield request.param
    cpu_extension.use_level(best)


def check(images: torch.Tensor, parameters, recipe: Augmentation) -> torch.Tensor:
    p, before = to_tensors(parameters, "cpu"), images.clone()
    ours = cpu_stage(recipe, torch.float32)(images, p, MEAN, STD)
    assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=CHANNELS_LAST)
    assert torch.equal(images, before)
    difference = (ours - augment(images, p, MEAN, STD, recipe)).abs()
    # A pixel that rounding puts on the other side of the solarisation threshold moves by one level.
    assert difference.mean() < 1e-6 and difference.max() < 0.02
    assert (difference > 1e-5).float().mean() < 1e-3
    rounded = cpu_stage(recipe, torch.bfloat16)(images, p, MEAN, STD)
    assert torch.equal(rounded, ours.to(torch.bfloat16))
    return ours


def strong(n: int):
    """All four jitters, by each of the 24 orders in turn."""
    orders = np.array(list(permutations(range(4))), dtype=np.int8)
    return off(n)._replace(
        brightness=np.full(n, 1.6, np.float32),
        contrast=np.full(n, 1.5, np.float32),
        saturation=np.full(n, 1.7, np.float32),
        hue=np.full(n, -0.15, np.float32),
        order=orders[np.arange(n) % 24],
    )


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize"])
def test_each_operation_alone(operation: str) -> None:
    values = getattr(drawn(8, dataclasses.replace(EVERYTHING, jitter_probability=1.0)), operation)
    if operation == "sigma":
        values = np.linspace(0.1, 2.0, 8, dtype=np.float32)
    elif operation in ("gray", "solarize"):
        values = np.arange(8) % 2 == 0
    images = photos(8)
    ours = check(images, off(8)._replace(**{operation: values}), EVERYTHING)
    assert (ours - normalize(images, MEAN, STD)).abs().max() > 0.1  # it did something


def test_all_orders() -> None:
    views = check(photos(1).expand(24, -1, -1, -1), strong(24), EVERYTHING).flatten(1)
    assert (torch.cdist(views, views) + torch.eye(24) * 9).min() > 1e-2  # 24 different pictures


@pytest.mark.parametrize("recipe", [EVERYTHING, *AUGMENTATIONS.values()], ids=lambda r: r.name)
def test_whole_recipes(recipe: Augmentation) -> None:
    check(photos(48), drawn(48, recipe), recipe)
    check(photos(6).contiguous(memory_format=CHANNELS_LAST), drawn(6, recipe, 3), recipe)


@pytest.mark.parametrize(
    "size",
    # One row is more than a strip; strips of several rows, the last one cut off; one row or column; no full vector.
    [(3, 1500), (50, 40), (224, 224), (1, 1), (2, 2), (1, 7), (9, 1), (17, 19), (5, 3), (40, 1024)],
)
def test_odd_sizes_and_windows_wider_than_the_image(size: tuple[int, int]) -> None:
    p = strong(3)._replace(sigma=np.array([0, 2, 0.6], np.float32), solarize=np.arange(3) > 1)
    check(torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8), p, EVERYTHING)


def test_wide_windows() -> None:
    recipe = dataclasses.replace(EVERYTHING, blur_sigma=(5.0, 9.0))
    p = off(3)._replace(sigma=np.array([5, 9, 7.3], np.float32))
    check(photos(3, 70, 60), p, recipe)


@pytest.mark.parametrize("recipe", [EVERYTHING, AUGMENTATIONS["digits"]], ids=lambda r: r.name)
def test_identity_is_normalisation_exactly(recipe: Augmentation) -> None:
    images, p = torch.arange(256, dtype=torch.uint8).expand(2, 3, 5, -1), to_tensors(off(2), "cpu")
    assert torch.equal(cpu_stage(recipe, torch.float32)(images, p, MEAN, STD), normalize(images, MEAN, STD))


def test_the_threshold_is_the_references() -> None:
    images = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, -1)
    p = to_tensors(off(2)._replace(solarize=np.array([True, False])), "cpu")
    for threshold in (0, 77, 128, 255):
        recipe = dataclasses.replace(EVERYTHING, solarize_threshold=threshold)
        ours = cpu_stage(recipe, torch.float32)(images, p, MEAN, STD)
        assert torch.equal(ours, augment(images, p, MEAN, STD, recipe))


def test_gray_and_extreme_pixels_stay_finite() -> None:
    images = torch.tensor([0, 255, 7, 7], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
    check(images, strong(4), EVERYTHING)


def test_neither_threads_nor_the_batch_change_a_bit() -> None:
    images, p, threads = photos(40), to_tensors(drawn(40, EVERYTHING), "cpu"), torch.get_num_threads()
    stage = cpu_stage(EVERYTHING, torch.float32)
    whole = stage(images, p, MEAN, STD)
    try:
        torch.set_num_threads(3)
        assert torch.equal(stage(images, p, MEAN, STD), whole)
    finally:
        torch.set_num_threads(threads)
    # Rows of a larger table.
    part = type(p)(*(column[5:9] for column in p))
    assert torch.equal(stage(images[5:9], part, MEAN, STD), whole[5:9])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_views(dtype: torch.dtype) -> None:
    images = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert cpu_stage(EVERYTHING, dtype)(images, to_tensors(off(0), "cpu"), MEAN, STD).shape == (0, 3, 8, 8)


def test_other_precisions_get_float32() -> None:
    views = cpu_stage(EVERYTHING, torch.float16)(photos(2), to_tensors(off(2), "cpu"), MEAN, STD)
    assert views.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 4), np.uint8)}, r"\(views, height, width, 3\)"),
        ({"out": np.zeros((2, 4, 5, 3), np.float32)}, "shape of the images"),
        ({"factors": np.ones((2, 3), np.float32)}, r"\(views, 4\)"),
        ({"sigma": np.zeros(1, np.float32)}, "one number a view"),
        ({"mean": np.zeros(1, np.float32)}, "three numbers"),
        ({"window": 5000}, "1024 pixels"),
        ({"threads": 0}, "at least 1"),
    ],
)
def test_what_would_be_out_of_bounds_is_refused(wrong: dict, message: str) -> None:
    one, flag = np.zeros(2, np.float32), np.zeros(2, np.uint8)
    arguments = {
        "images": np.zeros((2, 4, 4, 3), np.uint8),
        "factors": np.ones((2, 4), np.float32),
        "order": np.zeros((2, 4), np.float32),
        "gray": flag,
        "sigma": one,
        "solarize": flag,
        "mean": np.zeros(3, np.float32),
        "std": np.ones(3, np.float32),
        "window": 6,
        "threshold": 0.5,
        "out": np.zeros((2, 4, 4, 3), np.float32),
        "threads": 1,
    }
    with pytest.raises(ValueError, match=message):
        cpu_extension.augment_views(**(arguments | wrong))
