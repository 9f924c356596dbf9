"""Device-batch colour operations against torchvision v2 on float images, one image at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation
from falcon_fast.data.views.photometric import augment, gaussian_blur, normalize, to_tensors
from falcon_fast.data.views.sampling import PhotometricParameters

from .colours import EVERYTHING, MEAN, STD, drawn, off, photos


def torchvision_view(image: Tensor, p: PhotometricParameters, row: int, recipe: Augmentation) -> Tensor:
    from torchvision.transforms.v2 import functional as F

    x = image.float() / 255
    jitter = (
        lambda x: F.adjust_brightness(x, float(p.brightness[row])),
        lambda x: F.adjust_contrast(x, float(p.contrast[row])),
        lambda x: F.adjust_saturation(x, float(p.saturation[row])),
        lambda x: F.adjust_hue(x, float(p.hue[row])),
    )
    for operation in p.order[row]:
        x = jitter[operation](x)
    if p.gray[row]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if p.sigma[row] > 0:
        radius = math.ceil(3 * recipe.blur_sigma[1])
        kernel = [2 * min(radius, side - 1) + 1 for side in (x.shape[2], x.shape[1])]
        x = F.gaussian_blur(x, kernel, float(p.sigma[row]))
    if p.solarize[row]:
        x = F.solarize(x, recipe.solarize_threshold / 255)
    return F.normalize(x, MEAN.tolist(), STD.tolist())


def check(images: Tensor, p: PhotometricParameters, recipe: Augmentation) -> None:
    ours = augment(images, to_tensors(p, "cpu"), MEAN, STD, recipe)
    theirs = torch.stack([torchvision_view(image, p, row, recipe) for row, image in enumerate(images)])
    difference = (ours - theirs).abs()
    # A pixel that rounding puts on the other side of the solarisation threshold moves by one level: hence the mean
    # too.
    assert difference.mean() < 1e-5 and difference.max() < 0.02
    assert (difference > 1e-4).float().mean() < 1e-3


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue", "gray", "sigma", "solarize"])
def test_each_operation_alone(operation: str) -> None:
    images = photos(12)
    everything = drawn(12, replace(EVERYTHING, jitter_probability=1.0))
    values = getattr(everything, operation)
    if operation == "sigma":
        values = np.linspace(0.1, 2.0, 12, dtype=np.float32)
    elif operation in ("gray", "solarize"):
        values = np.arange(12) % 2 == 0
    p = off(12)._replace(**{operation: values})
    check(images, p, EVERYTHING)
    # It did something.
    assert (
        augment(images, to_tensors(p, "cpu"), MEAN, STD, EVERYTHING) - normalize(images, MEAN, STD)
    ).abs().max() > 0.1


def test_all_orders() -> None:
    n = 24
    orders = np.array(list(permutations(range(4))), dtype=np.int8)
    p = off(n)._replace(
        brightness=np.full(n, 1.6, np.float32),
        contrast=np.full(n, 1.5, np.float32),
        saturation=np.full(n, 1.7, np.float32),
        hue=np.full(n, 0.15, np.float32),
        order=orders,
    )
    images = photos(1).expand(n, -1, -1, -1)
    check(images, p, EVERYTHING)
    # All 24 orders of these factors give different pictures, so the order cannot have been ignored.
    views = augment(images, to_tensors(p, "cpu"), MEAN, STD, EVERYTHING).flatten(1)
    assert (torch.cdist(views, views) + torch.eye(n) * 9).min() > 1e-2


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "everything"])
def test_whole_recipes(name: str) -> None:
    recipe = EVERYTHING if name == "everything" else AUGMENTATIONS[name]
    check(photos(64), drawn(64, recipe), recipe)


@pytest.mark.parametrize("switched_off", ["brightness", "contrast", "saturation", "hue"])
def test_recipes_without_one_of_the_jitters(switched_off: str) -> None:
    recipe = replace(EVERYTHING, **{switched_off: 0.0})
    check(photos(32), drawn(32, recipe), recipe)


@pytest.mark.parametrize("size", [(2, 2), (5, 40), (1, 7)])
def test_windows_wider_than_the_image(size: tuple[int, int]) -> None:
    p = off(6)._replace(sigma=np.linspace(0.1, 2.0, 6, dtype=np.float32))
    check(torch.randint(0, 256, (6, 3, *size), dtype=torch.uint8), p, EVERYTHING)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("recipe", [EVERYTHING, *AUGMENTATIONS.values()], ids=lambda r: r.name)
def test_identity_is_normalisation_exactly(recipe: Augmentation, channels_last: bool) -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(3 * 4)[torch.randperm(3072)].view(4, 3, 16, 16)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    plain = normalize(images, MEAN, STD)
    torch.testing.assert_close(plain, ((images.double() / 255 - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)).float())
    before = images.clone()
    same = augment(images, to_tensors(off(4), "cpu"), MEAN, STD, recipe)
    assert torch.equal(same, plain) and torch.equal(images, before)
    for out in (plain, same):
        assert out.dtype == torch.float32 and out.stride() == (3 * 16 * 16, 1, 3 * 16, 3)


def test_blur_of_sigma_zero_is_exact_and_keeps_a_constant() -> None:
    x = torch.rand(3, 3, 9, 9)
    sigma = torch.tensor([0.0, 1.0, 2.0])
    assert torch.equal(gaussian_blur(x, sigma, 2.0)[0], x[0])
    constant = torch.full_like(x, 0.3)
    torch.testing.assert_close(gaussian_blur(constant, sigma, 2.0), constant)


def test_gray_and_extreme_pixels_stay_finite() -> None:
    images = torch.tensor([0, 255, 7, 7], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 8, 8)
    p = drawn(4, replace(EVERYTHING, jitter_probability=1.0))
    assert augment(images, to_tensors(p, "cpu"), MEAN, STD, EVERYTHING).isfinite().all()


def test_autocast_changes_nothing() -> None:
    images, p = photos(8), to_tensors(drawn(8, EVERYTHING), "cpu")
    plain = augment(images, p, MEAN, STD, EVERYTHING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, p, MEAN, STD, EVERYTHING), plain)


def test_to_tensors_keeps_every_value() -> None:
    p = drawn(20, EVERYTHING)
    t = to_tensors(p, torch.device("cpu"))
    for k, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        np.testing.assert_array_equal(t.factors[:, k].numpy(), getattr(p, name))
    for name in ("order", "gray", "sigma", "solarize"):
        np.testing.assert_array_equal(getattr(t, name).numpy(), getattr(p, name))
    assert t.gray.dtype == t.solarize.dtype == torch.bool


def test_nothing_waits_for_the_device() -> None:
    # Meta tensors have no values, so reading one on the host would raise.
    images, p = photos(8).to("meta"), to_tensors(drawn(8, EVERYTHING), "cpu")
    out = augment(images, type(p)(*(t.to("meta") for t in p)), MEAN.to("meta"), STD.to("meta"), EVERYTHING)
    assert out.shape == images.shape and out.is_contiguous(memory_format=torch.channels_last)


# The C++ compiler of inductor takes 10 to 25 seconds; that the graph is whole and the same for every batch shows
# without it.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_compiled_graph_serves_every_batch(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(augment, fullgraph=True, backend=backend)
    unit = torch.zeros(3), torch.ones(3)  # differences in [0, 1]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            images = photos(8, 16, 16).roll(seed, 0)
            p = to_tensors(drawn(8, EVERYTHING, seed), "cpu")
            ours = compiled(images, p, *unit, EVERYTHING)
            torch.testing.assert_close(ours, augment(images, p, *unit, EVERYTHING), rtol=0, atol=1e-5)
            assert ours.is_contiguous(memory_format=torch.channels_last)
