"""What follows the crop, for all loaders: jitter, grayscale, blur, solarise, normalise; on batches on the device, in float32.

The arithmetic is that of torchvision v2 on float images in [0, 1], with parameters per image, and without a loop over images, a
branch on data, or a wait for the device. Which stages it has depends on the recipe alone. This module is the reference.
`photometric_stage` chooses which faster implementation of the same arithmetic a run uses: C++ (kernels/cpu/view.hpp), `fused` for
a compiler (`photometric_compiled`), or Triton (kernels/gpu/views/augmentation.py).

**Random order without branches.** Brightness, contrast and saturation have one form,

    x <- clamp(r x + (1 - r) base),   base = 0 | mean over the image of gray(x) | gray(x),

so an image's operations are *coefficients* of a slot, x <- clamp(r x + s gray(x) + m mean gray(x)), and three slots give any
order of the three. Hue does not have this form. It is computed once, between three slots for what comes before it and three
slots for what comes after it. An operation on the other side of hue leaves its slot at (r, s, m) = (1, 0, 0), which is exact.

**Hue** shifts h of (h, s, v) by a number of turns. With chroma c = s v = max - min, the inverse conversion has the closed form
channel = v - c clamp(min(k, 4 - k), 0, 1), k = (o + 6 h) mod 6, o = 5, 3, 1 for red, green, blue.

**Blur** is a separable convolution whose weights differ from image to image, written as 13 shifted sums per axis. CPU
microseconds for one view of the whole symmetric recipe on one thread, eager / compiled: 88 / 31 at 32 px, 4300 / 1500 at 224 px.
With the blur as products with banded matrices they are 73 / 28 and 5100 / 2600, as depthwise convolutions 85 / 112 and 5200 /
5300 (the compiler converts every plane to channels_last for a convolution). Another reason for sums: autocast and TF32 do
not affect them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from falcon_fast.data.views.augmentation import Augmentation
from falcon_fast.data.views.sampling import PhotometricParameters

GRAY_WEIGHTS = (0.2989, 0.587, 0.114)
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
# Smallest sigma used. The neighbouring tap is then zero in float32 (exp(-200)), so that sigma 0 becomes the identity without a
# branch.
NO_BLUR = 0.05


class PhotometricTensors(NamedTuple):
    """`PhotometricParameters` on the device, with N rows."""

    factors: Tensor  # float32 (N, 4): brightness, contrast, saturation (1 = off), hue (turns, 0 = off)
    order: Tensor  # float32 (N, 4): the operations 0 to 3 of `factors`, first to last
    gray: Tensor  # bool (N,)
    sigma: Tensor  # float32 (N,), pixels; 0 = no blur
    solarize: Tensor  # bool (N,)


def to_tensors(parameters: PhotometricParameters, device: torch.device | str) -> PhotometricTensors:
    """Copy the parameters to a device, in one copy, which is asynchronous on a CUDA device."""
    p = parameters
    columns = (p.brightness, p.contrast, p.saturation, p.hue, *p.order.T, p.sigma, p.gray, p.solarize)
    packed = torch.from_numpy(np.stack(columns, axis=1, dtype=np.float32, casting="unsafe"))
    if torch.device(device).type == "cuda":
        packed = packed.pin_memory()
    packed = packed.to(device, non_blocking=True)
    return PhotometricTensors(
        factors=packed[:, 0:4],
        order=packed[:, 4:8],
        sigma=packed[:, 8],
        gray=packed[:, 9] > 0,
        solarize=packed[:, 10] > 0,
    )


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (images / 255 - mean) / std, which is all that evaluation does: float32 (N, 3, H, W), channels_last.

    images: uint8 (N, 3, H, W).  mean, std: float32 (3,), for pixels in [0, 1], on the same device.
    """
    return _normalized(images.to(torch.float32, memory_format=torch.channels_last) / 255, mean, std)


def augment(
    images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor, augmentation: Augmentation
) -> Tensor:
    """Change the colours of a batch of views by their parameters, and normalise them.

    Returns float32 (N, 3, H, W), channels_last.

    If all parameters are off, the result is exactly `normalize(images, mean, std)`.

    images: uint8 (N, 3, H, W), any strides.  parameters: N rows, from `to_tensors`.
    mean, std: float32 (3,), for pixels in [0, 1], on the same device.
    augmentation: the recipe that the parameters were drawn for; a stage that it never uses is not computed.
    """
    a = augmentation
    # Planes, not channels_last, until the end: sums over channels then read contiguous memory.
    x = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
    if a.jitter_probability > 0:
        x = _jitter(x, parameters.factors, parameters.order, a)
    if a.gray_probability > 0:
        x = torch.where(_per_image(parameters.gray), _gray(x), x)
    if max(a.blur_probability) > 0:
        x = gaussian_blur(x, parameters.sigma, a.blur_sigma[1])
    if max(a.solarize_probability) > 0:
        invert = _per_image(parameters.solarize) & (x >= a.solarize_threshold / 255)
        x = torch.where(invert, 1 - x, x)
    return _normalized(x, mean, std)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _normalized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    x = (x - mean[:, None, None]) / std[:, None, None]
    return x.contiguous(memory_format=torch.channels_last)


def _gray(x: Tensor) -> Tensor:
    """Return the luma of (N, 3, H, W): (N, 1, H, W)."""
    planes: tuple[Tensor, ...] = x.split(1, dim=1)
    red, green, blue = planes
    return GRAY_WEIGHTS[0] * red + GRAY_WEIGHTS[1] * green + GRAY_WEIGHTS[2] * blue


def _jitter(x: Tensor, factors: Tensor, order: Tensor, augmentation: Augmentation) -> Tensor:
    """Apply the recipe's brightness, contrast, saturation and hue, in each image's own order."""
    a = augmentation
    strengths = ((_BRIGHTNESS, a.brightness), (_CONTRAST, a.contrast), (_SATURATION, a.saturation))
    operations = [operation for operation, strength in strengths if strength > 0]
    # (N, 4): the place of each operation in the order.
    place = (order[:, None, :] == torch.arange(4, device=order.device)[:, None]).to(torch.uint8).argmax(2)
    if a.hue == 0:
        return _blend_slots(x, factors, place, operations, torch.ones_like(place, dtype=torch.bool))
    before_hue = place < place[:, _HUE, None]
    x = _blend_slots(x, factors, place, operations, before_hue)
    x = _shift_hue(x, factors[:, _HUE])
    return _blend_slots(x, factors, place, operations, ~before_hue)


def _blend_slots(x: Tensor, factors: Tensor, place: Tensor, operations: list[int], included: Tensor) -> Tensor:
    """Apply the included (N, 4) operations in order, in as many slots as there are operations; see the module's docstring.

    x is changed in place: without a compiler, most of the time of a large batch goes into writing to newly allocated memory.
    """
    for slot in range(len(operations)):
        ratio = torch.ones_like(factors[:, 0])
        here = {}
        for operation in operations:
            earlier = [included[:, other] & (place[:, other] < place[:, operation]) for other in operations]
            here[operation] = included[:, operation] & (sum(e.to(torch.uint8) for e in earlier) == slot)
            ratio = torch.where(here[operation], factors[:, operation], ratio)
        base = None
        if _CONTRAST in here or _SATURATION in here:
            gray, rest = _gray(x), 1 - ratio
            base = torch.zeros_like(gray)
            if _SATURATION in here:
                base.addcmul_(_per_image(rest * here[_SATURATION]), gray)
            if _CONTRAST in here:
                base.addcmul_(_per_image(rest * here[_CONTRAST]), gray.mean(dim=(1, 2, 3), keepdim=True))
        x.mul_(_per_image(ratio))
        if base is not None:
            x.add_(base)
        x.clamp_(0, 1)
    return x


def _shift_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue of (N, 3, H, W) by (N,) turns; where that is 0, the result is exactly x."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # A gray pixel has no hue; whatever is computed for it is multiplied by its chroma, 0.
    divisor = torch.where(chroma == 0, 1.0, chroma)
    sextant = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    shifted = sextant + _per_image(6 * turns)
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(shifted + offset, 6)
        channels.append(value - torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma))
    return torch.where(_per_image(turns == 0), x, torch.cat(channels, dim=1))


def gaussian_blur(x: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur with a Gaussian whose width differs per image, borders reflected (edge pixels not repeated).

    Where sigma is 0 the result is exactly x.

    x: float32 (N, C, H, W).  sigma: float32 (N,), pixels.
    max_sigma: pixels. The window has 2 ceil(3 max_sigma) + 1 taps for all images, or 2 (side - 1) + 1 on a side that is shorter.
    """
    for axis in (3, 2):
        side = x.shape[axis]
        radius = min(math.ceil(3 * max_sigma), side - 1)
        offsets = torch.arange(radius + 1, device=x.device, dtype=torch.float32)
        weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(NO_BLUR)[:, None]) ** 2)
        weights = weights / (2 * weights.sum(1, keepdim=True) - 1)
        padding = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        padded = torch.nn.functional.pad(x, padding, mode="reflect")
        x = padded.narrow(axis, radius, side) * _per_image(weights[:, 0])
        for offset in range(1, radius + 1):
            pair = padded.narrow(axis, radius - offset, side) + padded.narrow(axis, radius + offset, side)
            x.addcmul_(pair, _per_image(weights[:, offset]))
    return x
