"""The photometric stage by the C++ extension: uint8 views in, normalised views out (view.hpp)."""

from __future__ import annotations

import math

import numpy as np
import torch
from falcon_fast.kernels.cpu.extension import Compiled, cpu_extension

DTYPES = (torch.float32, torch.bfloat16)


def augment_views(
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
    """Views jittered, grayed, blurred, solarised and normalised, by torch's threads.

    images: uint8 (N, 3, H, W), any strides; channels_last is read as it is.
    factors: float32 (N, 4): brightness, contrast, saturation (1 = off), hue (turns, 0 = off).
    order: float32 (N, 4), the operations 0 to 3 of `factors`, first to last.
    gray, solarize: bool (N,).  sigma: float32 (N,), pixels, 0 = no blur.  mean, std: float32 (3,), of [0, 1].
    max_sigma: of the recipe; the blur's window is 2 ceil(3 max_sigma) + 1 taps, or as many as the side can reflect.
    threshold: what solarisation inverts from, in [0, 1].
    Returns (N, 3, H, W) in dtype, float32 or bfloat16, channels_last.
    """
    assert dtype in DTYPES
    n, channels, height, width = images.shape
    # By numpy, which asks for huge pages: the faults of small ones take 145 us a float32 view at 224 px.
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
