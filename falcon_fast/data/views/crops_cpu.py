"""Resize regions of decoded images on the CPU with Pillow's antialiased bicubic filter, in C++ or with Pillow itself.

The C++ kernels make the same pixels as Pillow, bit for bit, resizing first along rows and then along columns. Microseconds for
one region of 300 x 350 resized to 224 x 224 on one core: C++ 190 (AVX-512), torch's uint8 kernel 290 plus 250 to mirror the
result, Pillow 1170, DALI's CPU operator 3360.
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
    """Make one view with Pillow, the reference: uint8 (S, S, 3).

    box: top, left, height, width, in pixels.  flip: mirror left to right.
    """
    from PIL import Image

    top, left, rows, columns = box
    # Crop before resizing, as torchvision does: with resize(box=...) pixels outside the box would bleed in.
    region = image.crop((left, top, left + columns, top + rows))
    # Rows first, then columns, as Pillow did before version 13. Pillow 13 begins with the columns where that is cheaper. On a
    # dithered picture, whose overshoots are clipped between the passes, this changed a pixel by 3 levels.
    wide = region.resize((size, rows), Image.Resampling.BICUBIC)
    pixels = np.asarray(wide.resize((size, size), Image.Resampling.BICUBIC))
    return pixels[:, ::-1] if flip else pixels


def resized_crops(
    images: Sequence[np.ndarray], boxes: np.ndarray, flips: np.ndarray, size: int, pool: Executor
) -> torch.Tensor:
    """Return both views of all images: uint8 (2 B, S, S, 3), view 1 first.

    Without the C++ kernels, Pillow makes them in the threads of `pool`.

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
