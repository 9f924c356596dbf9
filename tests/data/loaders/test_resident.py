"""The resident loader: Pillow's crops to the bit, the clock's numbers and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from falcon_fast.config import DataConfig
from falcon_fast.data.loaders import resident, workers
from falcon_fast.data.loaders.batch import Batch
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.sources.decoding import header_size
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Split
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views import crops_torch
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError

from ..images import CPU, damage, joined, same, smooth, write_every_kind

RECIPE = AUGMENTATIONS["cifar-asymmetric"]


@pytest.fixture(scope="module")
def array_split() -> Split:
    """50 images of noise, 32 x 32, in memory: the sharpest there are."""
    random = np.random.RandomState(3)
    return Split(ImageArray(random.randint(0, 256, (50, 32, 32, 3)).astype(np.uint8)), np.arange(50) % 7)


@pytest.fixture(params=["C++", "torch"])
def crops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made by the extension, and by matrices as on a GPU."""
    if request.param == "torch":
        monkeypatch.setattr(resident, "cpu_extension", None)
    elif resident.cpu_extension is None:
        pytest.skip("extension not built")


def batches(split: Split, clock: Clock, size: int, steps: range, **options: Any) -> Iterator[Batch]:
    inputs, batch_of = resident.training_inputs(split, clock, size, steps, CPU, **options)
    return map(batch_of, inputs)


def check_same(split: Split, recipe: str, batch_size: int, size: int, steps: range) -> None:
    clock = Clock(11, len(split.images), batch_size, AUGMENTATIONS[recipe])
    ours = list(batches(split, clock, size, steps))
    theirs = list(workers.training_batches(split, clock, size, steps, CPU, workers=0))
    assert len(ours) == len(theirs) == len(steps)
    for a, b in zip(ours, theirs, strict=True):
        assert same(a, b)
    assert all(batch.views.is_contiguous(memory_format=torch.channels_last) for batch in ours)


def test_batches_are_those_of_the_workers_bit_for_bit(array_split: Split, crops: None) -> None:
    check_same(array_split, "cifar-asymmetric", 12, 32, range(10))  # into the third epoch
    check_same(array_split, "symmetric", 25, 17, range(2))
    check_same(array_split, "digits", 16, 32, range(4))


def test_the_digits_are_those_of_the_workers_bit_for_bit() -> None:
    source = open_source(DataConfig(source="digits"))
    check_same(source.train, "digits", 64, source.size, range(21, 24))


def test_files_of_different_sizes_and_kinds(tmp_path: Path, crops: None) -> None:
    paths = write_every_kind(tmp_path / "kinds")
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        smooth(20 + 9 * i, 70 - 9 * i, i).save(paths[-1])
    split = Split(ImageFiles(tuple(map(str, paths)), tuple(map(header_size, paths))), None)
    check_same(split, "imagenet-asymmetric", len(paths), 24, range(2))


def test_a_large_batch_is_cropped_in_parts(array_split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "cpu_extension", None)
    monkeypatch.setattr(crops_torch, "CHUNK", 32 * 32 * 3 * 7)
    check_same(array_split, "cifar-asymmetric", 12, 32, range(2))


@pytest.mark.parametrize("recipe", ["cifar-asymmetric", "digits"])
def test_starting_later_and_other_numbers_of_ranks_change_nothing(array_split: Split, recipe: str) -> None:
    clock = Clock(2, 50, 16, AUGMENTATIONS[recipe])  # 3 steps an epoch
    whole = list(batches(array_split, clock, 32, range(9)))
    later = list(batches(array_split, clock, 32, range(4, 9)))
    assert len(later) == 5 and all(map(same, whole[4:], later))
    for world in (2, 4):
        ranks = [batches(array_split, clock, 32, range(1, 8), rank=r, world_size=world) for r in range(world)]
        for batch, *parts in zip(whole[1:8], *ranks, strict=True):
            assert same(batch, joined(parts))


def test_bad_files_are_replaced_as_the_workers_replace_them(tmp_path: Path) -> None:
    paths = []
    for i in range(30):
        paths.append(tmp_path / f"{i:02d}.jpg")
        smooth(40, 30, i).save(paths[-1])
    split = Split(ImageFiles(tuple(map(str, paths)), tuple(map(header_size, paths))), np.arange(30))
    for victim, kind in ((3, "zeroed"), (4, "truncated"), (20, "empty")):
        damage(paths[victim], kind)
    clock = Clock(5, 30, 10, RECIPE)
    ours, theirs = Quarantine(split.images, 0.2), Quarantine(split.images, 0.2)
    by_us = batches(split, clock, 48, range(6), quarantine=ours)
    by_workers = workers.training_batches(split, clock, 48, range(6), CPU, workers=0, quarantine=theirs)
    assert all(map(same, by_us, by_workers))
    assert ours.bad == theirs.bad and set(ours.bad) == {3, 4, 20}
    with pytest.raises(UsageError, match="3 of 30 images cannot be decoded"):
        next(batches(split, clock, 16, range(6), quarantine=Quarantine(split.images, 0.08)))
