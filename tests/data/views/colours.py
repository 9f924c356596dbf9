"""Helpers of the tests of the photometric stages: images, parameters, and a recipe with everything in it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from falcon_fast.data.views.augmentation import Augmentation, CropRule
from falcon_fast.data.views.sampling import Clock, PhotometricParameters

MEAN = torch.tensor([0.49, 0.48, 0.45])


STD = torch.tensor([0.25, 0.24, 0.26])


EVERYTHING = Augmentation(
    name="everything",
    crop=CropRule(),
    jitter_probability=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.5,
    gray_probability=0.2,
    blur_probability=(0.5, 0.5),
    solarize_probability=(0.3, 0.3),
)


def photos(n: int, height: int = 24, width: int = 20) -> Tensor:
    """uint8 images with smooth areas, noise, saturated and exactly gray pixels: every branch of the hue formula."""
    generator = torch.Generator().manual_seed(n)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    images += 0.1 * torch.randn(n, 3, height, width, generator=generator)
    images = images.sub(0.5).mul(1.5).add(0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    images[:, :, :3] = images[:, :1, :3]
    images[:, :, 3] = 0
    return images


def off(n: int) -> PhotometricParameters:
    """Parameters that change nothing."""
    one, none = np.ones(n, np.float32), np.zeros(n, np.float32)
    order = np.tile(np.arange(4, dtype=np.int8), (n, 1))
    return PhotometricParameters(one, one, one, none, order, none.astype(bool), none, none.astype(bool))


def drawn(n: int, recipe: Augmentation, seed: int = 0) -> PhotometricParameters:
    """The parameters of both views of n / 2 images, as the clock draws them."""
    return Clock(seed, n, n // 2, recipe).at(0).photometric
