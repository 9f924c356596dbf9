"""The photometric stage arranged for a compiler: the arithmetic of `photometric.augment` in few passes over memory.

What keeps a compiler from making one loop of the eager form, and what is done about it here:

- The mean gray that contrast needs lies somewhere in each image's own order, so the eager form takes one in every slot. An image
  has one contrast: its mean is taken once, of what comes before it, and all six slots and hue are then one pass. Arithmetic
  done twice costs less than six passes over memory.
- Channels are three planes, never concatenated before the blur: gray, hue and the blends are pointwise.
- The remainder of the hue formula has no vector form in the compiler; a floor has.
- Reflected borders are materialised (`as_strided` makes the compiler do so): as index arithmetic they keep the 13 taps scalar.
- On a CPU the change of layout, uint8 in and channels_last out, stays outside, with torch's own copies, and a large batch is
  done in parts of equal size, its images in the order of the blur they need: the parts without any, and those for which half
  the window suffices, have graphs of their own, three in all.

Microseconds a view, eager / compiled, two threads of an AMD EPYC (AVX-512): ImageNet asymmetric at 224 px, batches of 64,
7800 / 770; symmetric 8200 / 760; CIFAR asymmetric at 32 px, batches of 512, 40 / 16. On one thread, batches of 32 at 224 px: 4400
to 4800 / 1100 to 1300.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from falcon_fast.data.augmentation import Augmentation
from falcon_fast.data.images import reason_of
from falcon_fast.data.photometric import GRAY_WEIGHTS, NO_BLUR, PhotometricTensors, augment
from falcon_fast.errors import UsageError
from falcon_fast.kernels import why_no_triton

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_Planes = tuple[Tensor, Tensor, Tensor]
CPU = torch.device("cpu")

# (images, parameters, mean, std) -> normalised views, as `photometric.augment` without its recipe
Photometric = Callable[[Tensor, PhotometricTensors, Tensor, Tensor], Tensor]

COMPILE_SECONDS = 60.0  # what compiling takes, and its gain must exceed; 20 to 30 on two cores
# Floats of one buffer at once: larger than 32 MiB, glibc's largest threshold, it would be fresh memory from the system each time.
CHUNK = 1 << 21
NEGLIGIBLE = 5.5  # widths from a Gaussian's centre, where it is 3e-7 of its height
SAVED_PER_PIXEL = 0.06e-6  # seconds of one CPU core, by the measurements above


class _Chain(NamedTuple):
    """What a pass over the jitter does to each image: (N, slots) of each coefficient before hue and after it, and (N,) turns."""

    before: tuple[Tensor, Tensor, Tensor]
    turns: Tensor
    after: tuple[Tensor, Tensor, Tensor]


class Plan(NamedTuple):
    """The numbers of a batch as `apply` needs them."""

    to_contrast: _Chain | None  # what comes before contrast, None where the recipe has no contrast
    whole: _Chain | None  # None where the recipe has no jitter
    gray: Tensor
    sigma: Tensor
    solarize: Tensor

    def part(self, rows: slice | Tensor) -> Plan:
        """Some of the images."""
        return tree_map(lambda tensor: None if tensor is None else tensor[rows], self)


def plan(parameters: PhotometricTensors, augmentation: Augmentation) -> Plan:
    """Small tensors, made once a batch: inside the loop over pixels a compiler would work them out anew for every vector."""
    a, p = augmentation, parameters
    if a.jitter_probability == 0:
        return Plan(None, None, p.gray, p.sigma, p.solarize)
    strengths = ((_BRIGHTNESS, a.brightness), (_CONTRAST, a.contrast), (_SATURATION, a.saturation))
    operations = [operation for operation, strength in strengths if strength > 0]
    # (N, 4): at which place each operation comes.
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

    to_contrast = chain(place < place[:, _CONTRAST, None]) if a.contrast > 0 else None
    return Plan(to_contrast, chain(everything), p.gray, p.sigma, p.solarize)


def apply(
    images: Tensor, plan: Plan, mean: Tensor, std: Tensor, augmentation: Augmentation, radius: int | None = None
) -> Tensor:
    """`photometric.augment` by a plan: float32 (N, 3, H, W) in any layout.

    radius: of the blur's window, where all these images' Gaussians are narrower than the recipe's widest; 0 for no blur.
    """
    a = augmentation
    x: _Planes = tuple(images[:, channel].float() / 255 for channel in range(3))  # type: ignore[assignment]
    if plan.whole is not None:
        gray_mean: Tensor | float = 0.0
        if plan.to_contrast is not None:
            gray_mean = _gray(_jitter(x, plan.to_contrast, 0.0, a)).mean((1, 2), keepdim=True)
        x = _jitter(x, plan.whole, gray_mean, a)
    if a.gray_probability > 0:
        gray = _gray(x)
        x = tuple(torch.where(plan.gray[:, None, None], gray, channel) for channel in x)  # type: ignore[assignment]
    y = torch.stack(x, 1)
    if radius is None:
        radius = max(_radii(a))
    if radius > 0:
        y = _blur(y, plan.sigma, radius)
    if max(a.solarize_probability) > 0:
        y = torch.where(plan.solarize[:, None, None, None] & (y >= a.solarize_threshold / 255), 1 - y, y)
    return (y - mean[:, None, None]) / std[:, None, None]


def fused(
    images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor, augmentation: Augmentation
) -> Tensor:
    """`photometric.augment`, but for the rounding: float32 (N, 3, H, W) in any layout."""
    return apply(images, plan(parameters, augmentation), mean, std, augmentation)


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
    """What each slot multiplies x, gray(x) and the mean gray by: three of (N, slots). (1, 0, 0) where a slot is not used."""
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
    # One division for the three cases of the sextant.
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


def _radii(augmentation: Augmentation) -> tuple[int, ...]:
    """Radii of the blur's windows, ascending, a graph each: none, the recipe's and one half as wide."""
    if max(augmentation.blur_probability) == 0:
        return (0,)
    radius = math.ceil(3 * augmentation.blur_sigma[1])
    return 0, radius // 2, radius


def by_radius(sigma: Tensor, radii: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Images in ascending order of the window that each needs, and those windows' radii."""
    needed = [
        0 if s == 0 else next((r for r in radii[1:-1] if r + 1 >= NEGLIGIBLE * s), radii[-1]) for s in sigma.tolist()
    ]
    order = sorted(range(len(needed)), key=needed.__getitem__)
    return order, [needed[image] for image in order]


def rows_at_once(images: Tensor) -> int:
    """Into how large parts a batch is cut on a CPU: the largest that divide it and stay below CHUNK."""
    limit = max(1, CHUNK // images[0].numel())
    return max(rows for rows in range(1, min(limit, len(images)) + 1) if len(images) % rows == 0)


def _fresh(shape: torch.Size) -> Tensor:
    """Empty float32 (N, 3, H, W), channels_last. By numpy, which asks for huge pages: the faults of small ones take
    145 us a view at 224 px, a fifth of the stage."""
    n, channels, height, width = shape
    return torch.from_numpy(np.empty((n, height, width, channels), np.float32)).permute(0, 3, 1, 2)


def pays(steps: int, views: int, size: int, threads: int) -> bool:
    """Whether compiling for a CPU gains more time than it takes, for this many steps of `views` views of `size` pixels a side."""
    return steps * views * size * size * SAVED_PER_PIXEL / threads > COMPILE_SECONDS


def triton_stage(augmentation: Augmentation, dtype: torch.dtype) -> Photometric:
    """`photometric.augment` in Triton: (N, 3, H, W) in `dtype`, channels_last, in one launch to three."""
    from falcon_fast.kernels.gpu.augmentation import Recipe, augment_views

    a = augmentation
    jitter = a.jitter_probability > 0
    recipe = Recipe(
        operations=(
            jitter and a.brightness > 0,
            jitter and a.contrast > 0,
            jitter and a.saturation > 0,
            jitter and a.hue > 0,
        ),
        gray=a.gray_probability > 0,
        max_sigma=a.blur_sigma[1] if max(a.blur_probability) > 0 else 0.0,
        solarize=max(a.solarize_probability) > 0,
        threshold=a.solarize_threshold / 255,
    )

    def stage(images: Tensor, p: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        return augment_views(images, p.factors, p.order, p.gray, p.sigma, p.solarize, mean, std, recipe, dtype)

    return stage


def photometric_stage(
    augmentation: Augmentation,
    mode: str,
    worthwhile: bool,
    say: Callable[[str], None] = lambda line: None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> Photometric:
    """The photometric stage of a run on `device`.

    mode: `eager`, `compiled`, `triton`, or `auto`: compiled if `worthwhile`, eager with a line to `say` where it cannot be
    compiled.
    dtype: of the views that triton makes; the others make float32.

    Raises:
        UsageError: mode is `triton` and it does not run on the device; when first called, mode is `compiled` or `triton` and
            there is no working compiler.
    """
    reason = why_no_triton(device)
    if mode == "triton" and reason:
        raise UsageError(f"data.photometric=triton does not work here ({reason}): set data.photometric=auto")

    def eager(images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        return augment(images, parameters, mean, std, augmentation)

    if mode == "eager" or (mode == "auto" and not worthwhile):
        return eager
    if mode == "triton":  # not auto's choice before it has run on a GPU
        stage = triton_stage(augmentation, dtype)
    else:
        stage = _compiled_stage(augmentation)
    chosen: list[Photometric] = []

    def first(images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        if chosen:
            return chosen[0](images, parameters, mean, std)
        try:
            views = stage(images, parameters, mean, std)
        except Exception as error:  # the compiler raises whatever it runs into, most often that there is no g++
            reason = reason_of(error)[:300]
            if mode in ("compiled", "triton"):
                raise UsageError(
                    f"the augmentations cannot be compiled ({reason}): set data.photometric=eager"
                ) from None
            say(f"the augmentations cannot be compiled ({reason}): they run uncompiled, more slowly")
            chosen.append(eager)
            return eager(images, parameters, mean, std)
        chosen.append(stage)
        return views

    return first


def _compiled_stage(augmentation: Augmentation) -> Photometric:
    whole = torch.compile(fused, fullgraph=True, dynamic=False)
    on_cpu = torch.compile(apply, fullgraph=True, dynamic=False)

    def compiled(images: Tensor, parameters: PhotometricTensors, mean: Tensor, std: Tensor) -> Tensor:
        if images.device.type != "cpu":
            views = whole(images, parameters, mean, std, augmentation)
            return views.contiguous(memory_format=torch.channels_last)
        rows, radii, numbers = rows_at_once(images), _radii(augmentation), plan(parameters, augmentation)
        if rows == len(images):
            views = on_cpu(images.contiguous(), numbers, mean, std, augmentation)
            return views.contiguous(memory_format=torch.channels_last)
        order, needed = by_radius(parameters.sigma, radii)
        numbers = numbers.part(torch.tensor(order))
        views = _fresh(images.shape)
        planes = torch.empty_like(images[:rows], memory_format=torch.contiguous_format)
        for first in range(0, len(images), rows):
            part = slice(first, first + rows)
            for plane, image in zip(planes, order[part], strict=True):
                plane.copy_(images[image])
            done = on_cpu(planes, numbers.part(part), mean, std, augmentation, max(needed[part]))
            for view, image in zip(done, order[part], strict=True):
                views[image] = view
        return views

    return compiled
