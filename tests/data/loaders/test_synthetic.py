"""The synthetic loader: one batch of random pixels, the clock's parameters, the labels of the images."""

from __future__ import annotations

import numpy as np
import torch

from falcon_fast.data.loaders import synthetic
from falcon_fast.data.sources.images import ImageArray, Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import Clock

from ..images import CPU

CLOCK = Clock(5, 40, 8, AUGMENTATIONS["cifar-asymmetric"])
SPLIT = Split(ImageArray(np.zeros((40, 2, 2, 3), np.uint8)), np.arange(40) % 7)


def test_the_pixels_stay_and_all_else_is_the_clocks() -> None:
    batches = list(synthetic.training_batches(SPLIT, CLOCK, 12, range(3, 6), CPU))
    assert [batch.step for batch in batches] == [3, 4, 5]
    for batch in batches:
        plan = CLOCK.at(batch.step)
        assert batch.views.shape == (16, 3, 12, 12) and batch.views.dtype == torch.uint8
        assert batch.views.is_contiguous(memory_format=torch.channels_last)
        assert batch.views.data_ptr() == batches[0].views.data_ptr()  # nothing is made anew
        assert batch.labels is not None and batch.labels.tolist() == (plan.indices % 7).tolist()
        expected = to_tensors(plan.photometric, CPU)
        assert all(torch.equal(a, b) for a, b in zip(batch.parameters, expected, strict=True))
    assert batches[0].views.float().std() > 60  # noise over all levels


def test_without_labels_there_are_none_and_ranks_share_the_batch() -> None:
    ranks = [
        next(synthetic.training_batches(Split(SPLIT.images, None), CLOCK, 12, range(1), CPU, rank=r, world_size=2))
        for r in range(2)
    ]
    assert all(batch.labels is None and len(batch.views) == 8 for batch in ranks)
    assert not torch.equal(ranks[0].views, ranks[1].views)


def test_the_largest_seed_has_pixels_for_every_process() -> None:
    clock = Clock(2**63 - 1, 40, 8, AUGMENTATIONS["cifar-asymmetric"])
    first, second = (
        next(iter(synthetic.training_batches(SPLIT, clock, 4, range(1), CPU, rank=rank, world_size=2)))
        for rank in (0, 1)
    )
    assert not torch.equal(first.views, second.views)
