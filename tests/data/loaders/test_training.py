"""The batches of training, from each loader: any start, any number of ranks, and the same views from all."""

from __future__ import annotations

import secrets
from contextlib import closing

import pytest

from falcon_fast.data.loaders.batch import Batch
from falcon_fast.data.loaders.resident import ViewInstructions
from falcon_fast.data.loaders.training import training_batches, training_inputs
from falcon_fast.data.sources.images import Source
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock

from ..dali import DALI, INSTALLED
from ..images import CPU, joined, same

CROPS = AUGMENTATIONS["imagenet-asymmetric"]


@pytest.mark.parametrize("name", [DALI, "resident", "workers", "synthetic"])
def test_any_start_and_any_number_of_ranks(name: str, photos: Source) -> None:
    clock = Clock(3, 36, 8, CROPS)
    whole = list(training_batches(name, photos, clock, range(10), CPU, workers_count=1))
    assert [batch.step for batch in whole] == list(range(10))
    assert all(batch.views.shape == (16, 3, 24, 24) for batch in whole)
    start = secrets.randbelow(9) + 1
    later = list(training_batches(name, photos, clock, range(start, 10), CPU, workers_count=0))
    assert len(later) == 10 - start and all(map(same, whole[start:], later)), start
    for world in (2, 4):
        ranks = [
            training_batches(name, photos, clock, range(2, 5), CPU, workers_count=0, rank=r, world_size=world)
            for r in range(world)
        ]
        for batch, *parts in zip(whole[2:5], *ranks, strict=True):
            together = joined(parts)
            # Synthetic pixels show nothing, so nobody needs them to be the same.
            assert same(together._replace(views=batch.views) if name == "synthetic" else together, batch)


def test_all_loaders_show_the_same(photos: Source) -> None:
    clock = Clock(3, 36, 12, CROPS)
    loaders = [
        training_batches(name, photos, clock, range(4), CPU, workers_count=0)
        for name in ("workers", *(["dali"] if INSTALLED else []), "resident")
    ]
    for reference, *others in zip(*loaders, strict=True):
        assert all(same(other, reference) for other in others)


@pytest.mark.parametrize("name", [DALI, "resident", "workers", "synthetic"])
def test_inputs_are_finished_batches_but_for_resident_images(name: str, photos: Source) -> None:
    inputs, batch_of = training_inputs(name, photos, Clock(3, 36, 12, CROPS), range(2, 4), CPU, workers_count=0)
    with closing(inputs):
        given = list(inputs)
    assert [each.step for each in given] == [2, 3]
    for each in given:
        assert isinstance(each, ViewInstructions if name == "resident" else Batch)
        batch = batch_of(each)
        assert isinstance(batch, Batch) and batch.step == each.step and (name == "resident" or batch is each)
