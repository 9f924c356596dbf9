"""Views made by the C++ extension: crops of decoded images (resize.hpp) and the photometric stage (view.hpp)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from falcon_fast.kernels.cpu.extension import Compiled, cpu_extension

DTYPES = (torch.float32, torch.bfloat16)


def resize_crops(images: Sequence[np.ndarray], boxes: np.ndarray, flips: np.ndarray, size: int) -> torch.Tensor:
    """Return two regions of each image, resized to `size` by antialiased bicubic interpolation as in Pillow.

    images: B arrays uint8 (H, W, 3), contiguous, of any sizes.  boxes: int64 (2, B, 4): top, left, height, width, in pixels.
    flips: bool (2, B), mirror left to right.
    Returns uint8 (2 B, S, S, 3), view 1 first. As many threads work as torch uses.

    Raises:
        ValueError: if a box does not lie within its image.
    """
    out = np.empty((2 * len(images), size, size, 3), np.uint8)
    Compiled(cpu_extension).resize_crops(
        list(images),
        np.ascontiguousarray(boxes),
        np.ascontiguousarray(flips).view(np.uint8),
        out,
        torch.get_num_threads(),
    )
    return torch.from_numpy(out)


def augment_views_cpp(
    images: torch.Tensor,
    factors: torch.Tensor,
    order: torch.Tensor,
    gray: torch.Tensor,
    sigma: torch.Tensor,
    solarize: torch.Tensor,
    mean: torch.Tensor,
    std: torch.Tensor,
    max_sigma: float,
    threshold: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return views after colour jitter, grayscale, blur, solarisation and normalisation; as many threads work as torch uses.

    images: uint8 (N, 3, H, W), any strides; channels_last needs no copy.
    factors: float32 (N, 4): brightness, contrast, saturation (1 = off), hue (turns, 0 = off).
    order: float32 (N, 4), the operations 0 to 3 of `factors`, first to last.
    gray, solarize: bool (N,).  sigma: float32 (N,), pixels, 0 = no blur.  mean, std: float32 (3,), of [0, 1].
    max_sigma: largest sigma of the recipe; the blur has 2 ceil(3 max_sigma) + 1 taps, or as many as the side can reflect.
    threshold: solarisation inverts values from this one on, in [0, 1].
    Returns (N, 3, H, W) in dtype, float32 or bfloat16, channels_last.
    """
    assert dtype in DTYPES
    n, channels, height, width = images.shape
    # Allocated by numpy, which asks for huge pages: page faults of small pages take 145 us for a float32 view of 224 px.
    out = np.empty((n, height, width, channels), np.float32 if dtype == torch.float32 else np.uint16)
    Compiled(cpu_extension).augment_views(
        images.permute(0, 2, 3, 1).contiguous(),
        factors.contiguous(),
        order.contiguous(),
        gray.contiguous().view(torch.uint8),
        sigma.contiguous(),
        solarize.contiguous().view(torch.uint8),
        mean,
        std,
        math.ceil(3 * max_sigma),
        threshold,
        out,
        torch.get_num_threads(),
    )
    views = torch.from_numpy(out)
    return (views if dtype == torch.float32 else views.view(dtype)).permute(0, 3, 1, 2)
