"""Regions of decoded images resized on the CPU: antialiased bicubic, Pillow's filter.

In C++ to the bit what Pillow makes, first along rows and then along columns. Microseconds for one region of 300 x 350 to
224 x 224 on one core: C++ 190 (AVX-512), torch's uint8 kernel 290 and 250 more to mirror it, Pillow 1170, DALI's CPU operator
3360.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import numpy as np
import torch

from falcon_fast.kernels import cpu_extension
from falcon_fast.kernels.cpu.views import resize_crops

if TYPE_CHECKING:
    from PIL.Image import Image


def pillow_crop(image: Image, box: Sequence[int], flip: bool, size: int) -> np.ndarray:
    """One view by Pillow, the reference: uint8 (S, S, 3).  box: top, left, height, width."""
    from PIL import Image

    top, left, rows, columns = box
    # Cropped before resizing, as torchvision does: resize(box=...) would let pixels outside the box bleed in.
    region = image.crop((left, top, left + columns, top + rows))
    # Rows, then columns, as Pillow did before 13, which begins with the columns where that is cheaper: in a dithered picture,
    # whose overshoots are cut in between, that moved a pixel by 3 levels.
    wide = region.resize((size, rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(wide.resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if flip else pixels


def resized_crops(
    images: Sequence[np.ndarray], boxes: np.ndarray, flips: np.ndarray, size: int, pool: Executor
) -> torch.Tensor:
    """Both views of all images: uint8 (2 B, S, S, 3), view 1 first; without the C++ kernels by Pillow, in the pool's threads.

    images: B of uint8 (H, W, 3).  boxes: int64 (2, B, 4), top, left, height, width.  flips: bool (2, B), mirror left to right.
    """
    if cpu_extension is not None:
        return resize_crops(images, boxes, flips, size)
    from PIL import Image

    views = np.empty((2, len(images), size, size, 3), np.uint8)

    def both(i: int) -> None:
        image = Image.fromarray(images[i])
        for view in range(2):
            views[view, i] = pillow_crop(image, boxes[view, i].tolist(), bool(flips[view, i]), size)

    for _ in pool.map(both, range(len(images))):
        pass
    return torch.from_numpy(views.reshape(-1, size, size, 3))
