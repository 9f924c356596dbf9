"""Affine views: scipy's pixels, and nothing else happens to the digits."""

from __future__ import annotations

import numpy as np
import torch

from falcon_fast.config import DataConfig
from falcon_fast.data.loaders.workers import training_batches
from falcon_fast.data.sources.images import Split
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.affine import warp
from falcon_fast.data.views.augmentation import AffineRule, Augmentation
from falcon_fast.data.views.sampling import Clock, affine_matrices

from ..images import CPU


def test_affine_views_are_scipys(array_split: Split) -> None:
    from scipy.ndimage import map_coordinates

    recipe = Augmentation("test", affine=AffineRule(30.0, (0.6, 1.3), 0.25, 10.0), flip_probability=0.5)
    assert recipe.affine is not None
    side, batch_size = 16, 25
    clock = Clock(5, 50, batch_size, recipe)
    (batch,) = training_batches(array_split, clock, side, range(1), CPU)
    plan = clock.at(0)
    assert 0 < plan.flips.sum() < 2 * batch_size
    middle = (side - 1) / 2
    columns, rows = np.meshgrid(np.arange(side) - middle, np.arange(side) - middle)  # pixels from the centre
    black = 0
    for view in range(2):
        for i, theta in enumerate(affine_matrices(plan.geometry[view], recipe.affine).astype(np.float64)):
            x, y = (
                np.einsum("ij,jrc->irc", theta[:, :2], np.stack([columns, rows])) + theta[:, 2, None, None] * side / 2
            )
            pixels = np.asarray(array_split.images.image(int(plan.indices[i]))).astype(np.float64)
            expected = np.stack(
                [
                    # A margin of black pixels: bilinear between the border and what is outside.
                    map_coordinates(np.pad(pixels[..., k], 1), [y + middle + 1, x + middle + 1], order=1, cval=0.0)
                    for k in range(3)
                ]
            )
            if plan.flips[view, i]:
                expected = expected[:, :, ::-1]
            ours = batch.views[view * batch_size + i].numpy()
            assert np.abs(ours - expected).max() < 0.51, (view, i)
            black += int((ours == 0).all(0).sum())
    assert black > 0


def test_the_digits_are_moved_about_and_nothing_else() -> None:
    # Identity within the rule: the views are the images.
    still = Augmentation("still", affine=AffineRule(0.0, (1.0, 1.0), 0.0, 0.0))
    source = open_source(DataConfig(source="digits"))
    clock = Clock(0, len(source.train.images), 16, still)
    (batch,) = training_batches(source.train, clock, source.size, range(1), CPU)
    expected = np.stack([np.asarray(source.train.images.image(int(i))) for i in clock.at(0).indices])
    for views in batch.views.chunk(2):
        assert np.array_equal(views.permute(0, 2, 3, 1).numpy(), expected)


def test_no_value_is_asked_of_the_device() -> None:
    # Meta tensors have no values, so reading one on the host would raise.
    images = torch.empty(4, 16, 16, 3, dtype=torch.uint8, device="meta")
    theta, flips = torch.empty(8, 2, 3, device="meta"), torch.empty(8, dtype=torch.bool, device="meta")
    assert warp(images, theta, flips).shape == (8, 16, 16, 3)
