"""The clock: (seed, epoch, position, view) -> which image, which crop, which jitter. A pure function.

Random numbers are counted, not drawn. An image's numbers in one view are the splitmix64 stream (Steele, Lea and
Flood, 2014) that starts at a hash of (seed, epoch, view, position in the epoch):

    start = mix(key(seed, epoch, view) + position g),   u_k = (mix(start + (k + 1) g) >> 11) / 2^53,   k = 0, 1, ...

with mix the splitmix64 finaliser, a bijection of the 64-bit integers, and g the odd number nearest
2^64 / golden ratio. The hash is integer arithmetic modulo 2^64 in numpy, the same on every machine and version. So
what a run sees depends neither on the number of processes and workers nor on when it was interrupted, and any view
can be replayed on its own.

Which column of the stream serves which purpose is fixed (flip, photometric, geometry: see `Clock.at`), so that
recipes which differ only in a probability see the same crops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from falcon_fast.data.views.augmentation import AffineRule, Augmentation, CropRule
from falcon_fast.errors import UsageError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

CROP_TRIES = 10
CROP_DRAWS = 2 * CROP_TRIES + 2
AFFINE_DRAWS = 5
PHOTOMETRIC_DRAWS = 10

# Row k: the k-th order in which brightness 0, contrast 1, saturation 2 and hue 3 can be applied.
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)


class PhotometricParameters(NamedTuple):
    """What happens to the colours of n views, as numbers. All arrays have n rows."""

    brightness: NDArray[np.float32]  # factor, 1 = off
    contrast: NDArray[np.float32]  # factor, 1 = off
    saturation: NDArray[np.float32]  # factor, 1 = off
    hue: NDArray[np.float32]  # turns, 0 = off
    order: NDArray[np.int8]  # (n, 4): the operations 0 brightness, 1 contrast, 2 saturation, 3 hue, first to last
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float32]  # of the Gaussian blur, pixels; 0 = no blur
    solarize: NDArray[np.bool_]


class BatchPlan(NamedTuple):
    """Everything random about one rank's share of one batch: n images, two views of each."""

    step: int
    epoch: int
    positions: NDArray[np.int64]  # (n,) global positions in the epoch
    indices: NDArray[np.int64]  # (n,) which image of the data set
    geometry: NDArray[np.float64]  # (2, n, G) uniforms for `crop_boxes` or `affine_matrices`, per view
    flips: NDArray[np.bool_]  # (2, n) mirror left to right, after the crop
    photometric: PhotometricParameters  # 2n rows: view 1, then view 2


def _mix_int(x: int) -> int:
    """The splitmix64 finaliser of one Python integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finaliser, in place, of an array that the caller gives up."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _starts(seed: int, epoch: int, purpose: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Where the stream of each position starts, (n,). purpose 0 is the epoch's order, 1 and 2 are the two views."""
    key = 0
    for part in (seed, epoch, purpose):
        key = _mix_int(_mix_int(part + _GOLDEN) + key * _GOLDEN)
    return _mix(positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def uniforms(seed: int, epoch: int, positions: NDArray[np.int64], view: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2^-53, for each position: float64 (n, count).

    seed: any integer (modulo 2^64).  positions: int64 (n,), in the epoch.  view: 0 or 1.  Column k is the same
    whatever `count` is, so a longer row only appends.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix(_starts(seed, epoch, view + 1, positions)[:, None] + steps)
    # As int64, which is exact after the shift: numpy converts signed integers to float64 faster than unsigned.
    return (bits >> np.uint64(11)).view(np.int64) * np.float64(2.0**-53)


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """The order in which an epoch visits the images: a permutation of range(num_images), int64."""
    return np.argsort(_starts(seed, epoch, 0, np.arange(num_images)), kind="stable")


def _spread(uniform: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + uniform * (high - low)


def crop_boxes(
    uniform: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64], rule: CropRule
) -> NDArray[np.int64]:
    """Crop boxes by torchvision's `RandomResizedCrop.get_params`: int64 (n, 4) = top, left, height, width.

    uniform: (n, >= CROP_DRAWS).  height, width: (n,) of the images, pixels. The first of ten tries that fits is taken
    (area uniform, ratio log-uniform, sides rounded half to even as Python's round does), its place uniform over all
    that fit; if none fits, the largest central box of an allowed ratio.
    """
    area = _spread(uniform[:, :CROP_TRIES], *rule.scale) * (height * width)[:, None]
    root_ratio = np.exp(_spread(uniform[:, CROP_TRIES : 2 * CROP_TRIES], *(0.5 * math.log(r) for r in rule.ratio)))
    root_area = np.sqrt(area)
    widths = np.rint(root_area * root_ratio)
    heights = np.rint(root_area / root_ratio)
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])

    first = fits.argmax(1)
    rows = np.arange(len(first))
    found = fits[rows, first]
    low, high = rule.ratio
    # Shrinking whichever side is too long leaves the whole image where the ratio is allowed already.
    box_height = np.where(found, heights[rows, first], np.clip(np.rint(width / low), 1, height)).astype(np.int64)
    box_width = np.where(found, widths[rows, first], np.clip(np.rint(height * high), 1, width)).astype(np.int64)

    free_height, free_width = height - box_height, width - box_width
    top = np.where(found, uniform[:, 2 * CROP_TRIES] * (free_height + 1), free_height // 2)
    left = np.where(found, uniform[:, 2 * CROP_TRIES + 1] * (free_width + 1), free_width // 2)
    return np.stack([top.astype(np.int64), left.astype(np.int64), box_height, box_width], axis=1)


def affine_matrices(uniform: NDArray[np.float64], rule: AffineRule) -> NDArray[np.float32]:
    """Affine maps for `torch.nn.functional.affine_grid(theta, size, align_corners=False)`: float32 (n, 2, 3).

    uniform: (n, >= AFFINE_DRAWS). theta takes output to input coordinates, both in [-1, 1] with y downwards, so it is
    the inverse of what happens to the picture, y = s R(a) S x + t, as in torchvision's `RandomAffine`
    (S = [[1, -tan b], [0, 1]]): theta = [A | -A t] with A = S^-1 R(-a) / s. The image is taken to be square.
    """
    angle = np.deg2rad(_spread(uniform[:, 0], -rule.degrees, rule.degrees))
    scale = _spread(uniform[:, 1], *rule.scale)
    # The side is 2 in these coordinates.
    shift = _spread(uniform[:, 2:4], -2 * rule.shift, 2 * rule.shift)
    tangent = np.tan(np.deg2rad(_spread(uniform[:, 4], -rule.shear, rule.shear)))

    cosine, sine = np.cos(angle) / scale, np.sin(angle) / scale
    theta = np.empty((len(uniform), 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 1] = cosine - tangent * sine, sine + tangent * cosine
    theta[:, 1, 0], theta[:, 1, 1] = -sine, cosine
    theta[:, :, 2] = -(theta[:, :, :2] @ shift[:, :, None])[:, :, 0]
    return theta


def photometric_parameters(
    uniform: NDArray[np.float64], augmentation: Augmentation, view: int
) -> PhotometricParameters:
    """What happens to the colours of n images in one view (0 or 1).

    uniform: (n, >= PHOTOMETRIC_DRAWS). Strengths as in torchvision's `ColorJitter`; all four are off together with
    probability 1 - jitter_probability.
    """
    a = augmentation
    jitter = uniform[:, 0] < a.jitter_probability

    def factor(column: int, strength: float) -> NDArray[np.float32]:
        drawn = _spread(uniform[:, column], max(0.0, 1 - strength), 1 + strength)
        return np.where(jitter, drawn, 1.0).astype(np.float32)

    return PhotometricParameters(
        brightness=factor(1, a.brightness),
        contrast=factor(2, a.contrast),
        saturation=factor(3, a.saturation),
        hue=np.where(jitter, _spread(uniform[:, 4], -a.hue, a.hue), 0.0).astype(np.float32),
        order=_ORDERS[(uniform[:, 5] * len(_ORDERS)).astype(np.int64)],
        gray=uniform[:, 6] < a.gray_probability,
        sigma=np.where(uniform[:, 7] < a.blur_probability[view], _spread(uniform[:, 8], *a.blur_sigma), 0.0).astype(
            np.float32
        ),
        solarize=uniform[:, 9] < a.solarize_probability[view],
    )


# Beside the clock rather than in it, so that a clock sent to a worker process carries no order of a million images.
# Two: at the end of an epoch a loader that reads ahead asks for both.
@lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return epoch_order(seed, epoch, num_images)


@dataclass(frozen=True)
class Clock:
    """What every step of a run sees, as a function of the step.

    batch_size is global: the images of one step over all ranks. The incomplete batch at the end of an epoch is
    dropped (its images differ from epoch to epoch). Raises UsageError if there is not one whole batch.
    """

    seed: int
    num_images: int
    batch_size: int
    augmentation: Augmentation

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"batch size {self.batch_size}: it must be at least 1")
        if self.batch_size > self.num_images:
            raise UsageError(
                f"batch size {self.batch_size} exceeds the {self.num_images} training images: "
                f"lower the batch size to {self.num_images} or less, or give more images"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.batch_size

    def candidates(self, epoch: int, position: int) -> Iterator[int]:
        """The image at a position of an epoch, then those that stand in for it where it cannot be read: the epoch's
        order from there on, round its end, each image once.
        """
        order = _cached_order(self.seed, epoch, self.num_images)
        return (int(order[(position + k) % self.num_images]) for k in range(self.num_images))

    def at(self, step: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
        """This rank's share of step `step` (counted from 0 over the whole run): a contiguous part of the global
        batch.

        The ranks' shares one after the other are the global batch, bit for bit. Raises UsageError if the batch size
        is no multiple of world_size.
        """
        if self.batch_size % world_size:
            raise UsageError(
                f"batch size {self.batch_size} does not divide into {world_size} processes: "
                f"make it a multiple of {world_size}"
            )
        if step < 0 or not 0 <= rank < world_size:
            raise UsageError(f"step {step}, rank {rank} of {world_size}: give step >= 0 and 0 <= rank < world size")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        share = self.batch_size // world_size
        first = step_in_epoch * self.batch_size + rank * share
        positions = np.arange(first, first + share, dtype=np.int64)

        flip, photometric = slice(0, 1), slice(1, 1 + PHOTOMETRIC_DRAWS)
        geometry = slice(photometric.stop, photometric.stop + (CROP_DRAWS if self.augmentation.crop else AFFINE_DRAWS))
        # Measured at batch 256 with crops, both views and `crop_boxes` included: 1.0 us an image (one core of an
        # EPYC).
        draws = np.stack([uniforms(self.seed, epoch, positions, view, geometry.stop) for view in (0, 1)])
        views = [photometric_parameters(draws[view, :, photometric], self.augmentation, view) for view in (0, 1)]
        return BatchPlan(
            step=step,
            epoch=epoch,
            positions=positions,
            indices=_cached_order(self.seed, epoch, self.num_images)[first : first + share].copy(),
            geometry=draws[:, :, geometry],
            flips=draws[:, :, flip.start] < self.augmentation.flip_probability,
            photometric=PhotometricParameters(*(np.concatenate(pair) for pair in zip(*views, strict=True))),
        )
