"""Crops as matrix products: Pillow's to the bit, without a value on the host."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from falcon_fast.data.views.crops_torch import crop


@given(
    sides=st.tuples(*[st.integers(1, 70)] * 2), size=st.integers(1, 40), flip=st.booleans(), seed=st.integers(0, 999)
)
def test_any_region_is_pillows(sides: tuple[int, int], size: int, flip: bool, seed: int) -> None:
    random = np.random.RandomState(seed)
    height, width = sides
    pixels = (random.rand(height, width, 3) * 256).astype(np.uint8)
    rows, columns = random.randint(1, height + 1), random.randint(1, width + 1)
    top, left = random.randint(0, height - rows + 1), random.randint(0, width - columns + 1)
    box = (left, top, left + columns, top + rows)
    # One axis after the other: which of them Pillow 13 takes first depends on the sides.
    region = Image.fromarray(pixels).crop(box).resize((size, rows), Image.Resampling.BICUBIC)
    expected = np.asarray(region.resize((size, size), Image.Resampling.BICUBIC))
    boxes = torch.tensor([[top, left, rows, columns]])
    (ours,) = crop(torch.from_numpy(pixels)[None], boxes, torch.tensor([flip]), size)
    assert np.array_equal(ours.permute(1, 2, 0).numpy(), expected[:, ::-1] if flip else expected)


def test_no_value_is_asked_of_the_device() -> None:
    # Meta tensors have no values, so reading one on the host would raise.
    def meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    views = crop(meta(8, 32, 32, 3, dtype=torch.uint8), meta(8, 4), meta(8, dtype=torch.bool), 24)
    assert views.shape == (8, 3, 24, 24) and views.dtype == torch.uint8
