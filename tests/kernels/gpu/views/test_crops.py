"""Crops of resident images by the Triton kernel: Pillow's to the bit, on a GPU if there is one, else in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from falcon_fast.data.loaders import resident
from falcon_fast.data.views.crops_cpu import pillow_crop

pytest.importorskip("triton")
from falcon_fast.kernels.gpu.views import crops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cropped(images: np.ndarray, indices, boxes, flips, size: int) -> np.ndarray:
    tensors = (torch.from_numpy(np.asarray(x)).to(DEVICE) for x in (images, indices, boxes, flips))
    return crops.crop_views(*tensors, size).cpu().numpy()


def expected(images: np.ndarray, indices, boxes, flips, size: int) -> np.ndarray:
    pictures = [Image.fromarray(images[indices[view % len(indices)]]) for view in range(len(boxes))]
    return np.stack([pillow_crop(*each, size) for each in zip(pictures, boxes, flips, strict=True)])


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (32, 32, 32),
        (20, 33, 16),
        (48, 40, 70),
        (90, 70, 11),
        (1, 1, 5),
    ],  # also larger than a block, reduced 8 times, one pixel
)
def test_crops_are_pillows_to_the_bit(height, width, size):
    random = np.random.RandomState(height)
    images = random.randint(0, 256, (4, height, width, 3)).astype(np.uint8)
    images[1] = 255 * (images[1] > 127)  # overshoots, which each pass cuts
    indices = np.array([1, 3, 1])
    rows, columns = random.randint(1, height + 1, 6), random.randint(1, width + 1, 6)
    rows[0], columns[0] = height, width
    top, left = (random.randint(0, side - part + 1) for side, part in ((height, rows), (width, columns)))
    boxes = np.stack([top, left, rows, columns], 1)
    flips = np.array([False, True, False, True, True, False])
    found = cropped(images, indices, boxes, flips, size)
    assert (found == expected(images, indices, boxes, flips, size)).all()


def test_the_kernel_is_compared_with_the_products_before_it_is_used(monkeypatch):
    images = torch.randint(0, 256, (5, 24, 20, 3), dtype=torch.uint8, device=DEVICE)
    assert resident.kernel_differs(images, 16) is None
    right = crops.crop_views
    monkeypatch.setattr(crops, "crop_views", lambda *arguments: right(*arguments) + 1)
    assert resident.kernel_differs(images, 16) == "gives other pixels"
    monkeypatch.setattr(crops, "crop_views", lambda *arguments: 1 / 0)
    assert "division" in str(resident.kernel_differs(images, 16))


def test_two_launches_and_nothing_read_off_the_device():
    from falcon_fast.kernels.gpu.resources import crop_launches

    assert [launched.constants["ACROSS"] for launched in crop_launches((512, 32, 32))] == [True, False]
