"""The clock: a pure function from (seed, epoch, position, view) to the image, its crop and its jitter.

Random numbers are computed from a counter, not drawn from a generator. The numbers of an image in one view are the splitmix64
stream (Steele, Lea and Flood, 2014) that starts at a hash of (seed, epoch, view, position in the epoch):

    start = mix(key(seed, epoch, view) + position g),   u_k = (mix(start + (k + 1) g) >> 11) / 2^53,   k = 0, 1, ...

Here mix is the splitmix64 finaliser, a bijection of the 64-bit integers, and g is the odd number nearest to 2^64 / golden ratio.
The hash is integer arithmetic modulo 2^64 in numpy, the same on every machine and in every version. So what a run sees depends
neither on the number of processes and workers nor on interruptions, and any single view can be replayed.

Each choice reads fixed columns of the stream (flip, photometric, geometry: see `Clock.at`), so that recipes which differ only in
a probability see the same crops.
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

# Row k is the k-th of the 24 orders of brightness 0, contrast 1, saturation 2 and hue 3.
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int8)


class PhotometricParameters(NamedTuple):
    """What happens to the colours of n views, as numbers. All arrays have n rows."""

    brightness: NDArray[np.float32]  # factor, 1 = off
    contrast: NDArray[np.float32]  # factor, 1 = off
    saturation: NDArray[np.float32]  # factor, 1 = off
    hue: NDArray[np.float32]  # turns, 0 = off
    order: NDArray[np.int8]  # (n, 4): the operations 0 brightness, 1 contrast, 2 saturation, 3 hue, first to last
    gray: NDArray[np.bool_]
    sigma: NDArray[np.float32]  # standard deviation of the Gaussian blur in pixels; 0 = no blur
    solarize: NDArray[np.bool_]


class BatchPlan(NamedTuple):
    """Everything random about one rank's share of one batch: the clock's numbers for n images, two views of each."""

    step: int
    epoch: int
    positions: NDArray[np.int64]  # (n,) global positions in the epoch
    indices: NDArray[np.int64]  # (n,) number of the image in the data set
    geometry: NDArray[np.float64]  # (2, n, G) uniforms for `crop_boxes` or `affine_matrices`, per view
    flips: NDArray[np.bool_]  # (2, n) mirror left to right, after the crop
    photometric: PhotometricParameters  # 2n rows: view 1, then view 2


def _mix_int(x: int) -> int:
    """Return the splitmix64 finaliser of one Python integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the splitmix64 finaliser to an array, in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _starts(seed: int, epoch: int, purpose: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return where the stream of each position starts, (n,). purpose 0 is the epoch's order; 1 and 2 are the two views."""
    key = 0
    for part in (seed, epoch, purpose):
        key = _mix_int(_mix_int(part + _GOLDEN) + key * _GOLDEN)
    return _mix(positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def uniforms(seed: int, epoch: int, positions: NDArray[np.int64], view: int, count: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), multiples of 2^-53, for each position: float64 (n, count).

    seed: any integer (modulo 2^64).  positions: int64 (n,), in the epoch.  view: 0 or 1.
    count: columns. Column k does not depend on it: a larger `count` only appends columns.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix(_starts(seed, epoch, view + 1, positions)[:, None] + steps)
    # As int64, which is exact after the shift: numpy converts signed integers to float64 faster than unsigned ones.
    return (bits >> np.uint64(11)).view(np.int64) * np.float64(2.0**-53)


def epoch_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    """Return the order in which an epoch visits the images: a permutation of range(num_images), int64."""
    return np.argsort(_starts(seed, epoch, 0, np.arange(num_images)), kind="stable")


def _spread(uniform: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + uniform * (high - low)


def crop_boxes(
    uniform: NDArray[np.float64], height: NDArray[np.int64], width: NDArray[np.int64], rule: CropRule
) -> NDArray[np.int64]:
    """Return crop boxes as torchvision's `RandomResizedCrop.get_params` draws them: int64 (n, 4) = top, left, height, width.

    Of ten tries (area uniform, ratio log-uniform, sides rounded half to even as Python's round does) the first that fits into the
    image is taken, at a place that is uniform over all places where it fits. If none fits, the box is the largest central one
    with an allowed ratio.

    uniform: (n, >= CROP_DRAWS).  height, width: (n,), of the images, in pixels.
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
    # Shrinking the side that is too long keeps the whole image if its ratio is allowed already.
    box_height = np.where(found, heights[rows, first], np.clip(np.rint(width / low), 1, height)).astype(np.int64)
    box_width = np.where(found, widths[rows, first], np.clip(np.rint(height * high), 1, width)).astype(np.int64)

    free_height, free_width = height - box_height, width - box_width
    top = np.where(found, uniform[:, 2 * CROP_TRIES] * (free_height + 1), free_height // 2)
    left = np.where(found, uniform[:, 2 * CROP_TRIES + 1] * (free_width + 1), free_width // 2)
    return np.stack([top.astype(np.int64), left.astype(np.int64), box_height, box_width], axis=1)


def affine_matrices(uniform: NDArray[np.float64], rule: AffineRule) -> NDArray[np.float32]:
    """Return affine maps for `torch.nn.functional.affine_grid(theta, size, align_corners=False)`: float32 (n, 2, 3).

    theta maps output to input coordinates, both in [-1, 1] with y downwards. It is the inverse of what happens to the picture,
    y = s R(a) S x + t, as in torchvision's `RandomAffine` (S = [[1, -tan b], [0, 1]]): theta = [A | -A t] with
    A = S^-1 R(-a) / s. The image is assumed to be square.

    uniform: (n, >= AFFINE_DRAWS).
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
    """Return what happens to the colours of n images in one view (0 or 1).

    Strengths are as in torchvision's `ColorJitter`; with probability 1 - jitter_probability all four operations are off together.

    uniform: (n, >= PHOTOMETRIC_DRAWS). Each column serves one choice.
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


# A function rather than a field of the clock, so that a clock sent to a worker process does not carry the order of a million
# images. Two orders are kept: at the end of an epoch a loader that reads ahead asks for both.
@lru_cache(maxsize=2)
def _cached_order(seed: int, epoch: int, num_images: int) -> NDArray[np.int64]:
    return epoch_order(seed, epoch, num_images)


@dataclass(frozen=True)
class Clock:
    """What every step of a run sees, as a function of the step.

    Attributes:
        seed: of the run; any integer.
        num_images: images in the training split.
        batch_size: images of one step over all ranks. The incomplete batch at the end of an epoch is dropped; its images differ
            from epoch to epoch.
        augmentation: the recipe.

    Raises UsageError if there are too few images for one batch.
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
        """Yield the image at a position of an epoch, then the images that stand in for it if it cannot be read.

        They follow the epoch's order from the position on, wrap around at its end, and contain each image once.
        """
        order = _cached_order(self.seed, epoch, self.num_images)
        return (int(order[(position + k) % self.num_images]) for k in range(self.num_images))

    def at(self, step: int, rank: int = 0, world_size: int = 1) -> BatchPlan:
        """Return this rank's share of step `step` (counted from 0 over the whole run), a contiguous part of the global batch.

        The shares of all ranks, concatenated, are the global batch, bit for bit. Raises UsageError if the batch size is not a
        multiple of world_size, or if `step` or `rank` is out of range.
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
        # Measured at batch 256 with crops, for both views and with `crop_boxes`: 1.0 us per image (one core of an EPYC).
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
