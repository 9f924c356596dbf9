"""The photometric stage arranged for a compiler: the arithmetic of `photometric.augment` in few passes over memory.

Four things keep a compiler from making one loop out of the eager form. This module avoids them:

- Contrast needs the mean gray, at a place that depends on each image's own order, so the eager form computes one in every slot.
  But an image has one contrast: here the mean is computed once, over what comes before contrast, and then all six slots and hue
  are one pass. Computing some arithmetic twice costs less than six passes over memory.
- Channels are three planes, never concatenated before the blur: gray, hue and the blends are pointwise.
- The compiler has no vector form for the remainder in the hue formula, but it has one for a floor.
- Reflected borders are materialised (`as_strided` forces the compiler to do so): as index arithmetic they would keep the 13 taps
  scalar.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from falcon_fast.data.views.augmentation import Augmentation
from falcon_fast.data.views.photometric import GRAY_WEIGHTS, NO_BLUR, PhotometricTensors

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_Planes = tuple[Tensor, Tensor, Tensor]


class _Chain(NamedTuple):
    """The jitter of each image in one pass: coefficients (N, slots) before and after hue, and the hue shift in (N,) turns."""

    before: tuple[Tensor, Tensor, Tensor]
    turns: Tensor
    after: tuple[Tensor, Tensor, Tensor]


def _chains(p: PhotometricTensors, a: Augmentation) -> tuple[_Chain | None, _Chain]:
    """Return the chain of what comes before contrast (None if the recipe has no contrast), and that of the whole jitter."""
    strengths = ((_BRIGHTNESS, a.brightness), (_CONTRAST, a.contrast), (_SATURATION, a.saturation))
    operations = [operation for operation, strength in strengths if strength > 0]
    # (N, 4): the place of each operation in the order.
    number = torch.arange(4, device=p.order.device, dtype=p.order.dtype)
    place = ((p.order[:, None, :] == number[:, None]) * number).sum(2)
    everything = torch.ones_like(place, dtype=torch.bool)
    before_hue = place < place[:, _HUE, None] if a.hue > 0 else everything

    def chain(included: Tensor) -> _Chain:
        return _Chain(
            _coefficients(p.factors, place, operations, included & before_hue),
            torch.where(included[:, _HUE], p.factors[:, _HUE], 0.0),
            _coefficients(p.factors, place, operations, included & ~before_hue),
        )

    return chain(place < place[:, _CONTRAST, None]) if a.contrast > 0 else None, chain(everything)


def fused(
    images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor, augmentation: Augmentation
) -> Tensor:
    """Compute `photometric.augment`, up to rounding: float32 (N, 3, H, W) in any layout."""
    a, p = augmentation, parameters
    x: _Planes = tuple(images[:, channel].float() / 255 for channel in range(3))  # type: ignore[assignment]
    if a.jitter_probability > 0:
        to_contrast, whole = _chains(p, a)
        gray_mean: Tensor | float = 0.0
        if to_contrast is not None:
            gray_mean = _gray(_jitter(x, to_contrast, 0.0, a)).mean((1, 2), keepdim=True)
        x = _jitter(x, whole, gray_mean, a)
    if a.gray_probability > 0:
        gray = _gray(x)
        x = tuple(torch.where(p.gray[:, None, None], gray, channel) for channel in x)  # type: ignore[assignment]
    y = torch.stack(x, 1)
    if max(a.blur_probability) > 0:
        y = _blur(y, p.sigma, math.ceil(3 * a.blur_sigma[1]))
    if max(a.solarize_probability) > 0:
        y = torch.where(p.solarize[:, None, None, None] & (y >= a.solarize_threshold / 255), 1 - y, y)
    return (y - mean[:, None, None]) / std[:, None, None]


def _gray(x: _Planes) -> Tensor:
    red, green, blue = (weight * channel for weight, channel in zip(GRAY_WEIGHTS, x, strict=True))
    return red + green + blue


def _jitter(x: _Planes, chain: _Chain, mean: Tensor | float, a: Augmentation) -> _Planes:
    x = _blends(x, *chain.before, mean)
    if a.hue > 0:
        x = _blends(_shift_hue(x, chain.turns[:, None, None]), *chain.after, mean)
    return x


def _coefficients(
    factors: Tensor, place: Tensor, operations: list[int], included: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what each slot multiplies x, gray(x) and the mean gray by: three tensors (N, slots).

    They are (1, 0, 0) in a slot that is not used.
    """
    one = torch.ones_like(factors[:, 0])
    slots = []
    for slot in range(len(operations)):
        ratio, saturation, contrast = one, torch.zeros_like(one), torch.zeros_like(one)
        for operation in operations:
            earlier = [included[:, other] & (place[:, other] < place[:, operation]) for other in operations]
            here = included[:, operation] & (sum(e.float() for e in earlier) == slot)
            ratio = torch.where(here, factors[:, operation], ratio)
            if operation == _SATURATION:
                saturation = torch.where(here, 1 - factors[:, operation], 0.0)
            if operation == _CONTRAST:
                contrast = torch.where(here, 1 - factors[:, operation], 0.0)
        slots.append((ratio, saturation, contrast))
    ratios, saturations, contrasts = (torch.stack(column, 1) for column in zip(*slots, strict=True))
    return ratios, saturations, contrasts


def _blends(x: _Planes, ratio: Tensor, saturation: Tensor, contrast: Tensor, mean: Tensor | float) -> _Planes:
    for slot in range(ratio.shape[1]):
        r, s, m = (each[:, slot, None, None] for each in (ratio, saturation, contrast))
        base = s * _gray(x) + m * mean
        x = tuple((r * channel + base).clamp(0, 1) for channel in x)  # type: ignore[assignment]
    return x


def _shift_hue(x: _Planes, turns: Tensor) -> _Planes:
    red, green, blue = x
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    # One division serves the three cases of the sextant.
    is_red, is_green = value == red, value == green
    difference = torch.where(is_red, green - blue, torch.where(is_green, blue - red, red - green))
    offset = torch.where(is_red, 0.0, torch.where(is_green, 2.0, 4.0))
    shifted = difference / torch.where(chroma == 0, 1.0, chroma) + offset + 6 * turns
    channels = []
    for which, channel in zip((5, 3, 1), x, strict=True):
        k = shifted + which
        k = k - 6 * torch.floor(k * (1 / 6))
        moved = value - torch.minimum(k, 4 - k).clamp(0, 1) * chroma
        channels.append(torch.where(turns == 0, channel, moved))
    return tuple(channels)  # type: ignore[return-value]


def _blur(x: Tensor, sigma: Tensor, window: int) -> Tensor:
    for axis in (3, 2):
        side = x.shape[axis]
        radius = min(window, side - 1)
        offsets = torch.arange(radius + 1, device=x.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(NO_BLUR)[:, None]) ** 2)
        weights = (weights / (2 * weights.sum(1, keepdim=True) - 1))[:, :, None, None, None]
        padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = torch.nn.functional.pad(x, padding, mode="reflect")
        padded = padded.as_strided(padded.shape, padded.stride())
        x = padded.narrow(axis, radius, side) * weights[:, 0]
        for offset in range(1, radius + 1):
            pair = padded.narrow(axis, radius - offset, side) + padded.narrow(axis, radius + offset, side)
            x = x + pair * weights[:, offset]
    return x
