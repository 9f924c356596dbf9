"""The loader of worker processes: its crops against torchvision's, and that nothing but the clock decides them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.workers import auto_workers, training_batches
from falcon_fast.data.sources.images import ImageFiles, Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS, Augmentation, CropRule
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import Clock, crop_boxes
from falcon_fast.errors import TemporaryError, UsageError

from ..images import CPU, assert_no_workers_left, damage, same

CROPPED = AUGMENTATIONS["imagenet-asymmetric"]


def test_starting_the_workers_draws_nothing_from_the_random_state_of_the_run(split: Split) -> None:
    """A resumed run starts them once more than an undisturbed one, and its dropout must be the same."""
    before = torch.get_rng_state()
    list(training_batches(split, Clock(0, 36, 6, CROPPED), 8, range(2), CPU, workers=1))
    list(evaluation_batches(split, 8, CPU, workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def check_crops(split: Split, batch_size: int, size: int, steps: range, flip_probability: float = 0.5) -> None:
    """Every view bit for bit as torchvision crops, resizes and mirrors a PIL image by the clock's numbers, rows first, then
    columns: together, Pillow 13 decides which comes first.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    recipe = dataclasses.replace(CROPPED, flip_probability=flip_probability)
    assert recipe.crop is not None
    clock = Clock(11, len(split.images), batch_size, recipe)
    flipped = 0
    for batch in training_batches(split, clock, size, steps, CPU, workers=0):
        plan = clock.at(batch.step)
        images = [split.images.image(int(i)) for i in plan.indices]
        width, height = np.array([image.size for image in images]).T
        for view in range(2):
            boxes = crop_boxes(plan.geometry[view], height, width, recipe.crop)
            for i, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
                bicubic = {"interpolation": InterpolationMode.BICUBIC, "antialias": True}
                together = functional.resized_crop(image, *box, size=[size, size], **bicubic)
                wide = functional.resized_crop(image, *box, size=[box[2], size], **bicubic)
                expected = functional.resize(wide, [size, size], **bicubic)
                difference = functional.pil_to_tensor(expected).int() - functional.pil_to_tensor(together)
                assert difference.abs().float().mean() <= 0.5
                if plan.flips[view, i]:
                    expected = functional.horizontal_flip(expected)
                    flipped += 1
                assert torch.equal(batch.views[view * batch_size + i], functional.pil_to_tensor(expected))
    total = 2 * batch_size * len(steps)
    assert flipped == (0 if flip_probability == 0 else pytest.approx(total / 2, abs=2 * total**0.5))


def test_crops_are_torchvisions_bit_for_bit(split: Split) -> None:
    check_crops(split, 12, 32, range(4))  # upsampled
    check_crops(split, 12, 7, range(3, 6))  # downsampled, into the next epoch


def test_crops_without_flip(array_split: Split) -> None:
    check_crops(array_split, 10, 16, range(1), flip_probability=0.0)


def test_crops_of_photographs_are_torchvisions_bit_for_bit(shared: Path) -> None:
    paths = sorted((shared / "data" / "imagenet-sample").rglob("*.JPEG"))[::16]
    check_crops(Split(ImageFiles(tuple(map(str, paths))), None), len(paths), 224, range(1))


def test_the_contract_of_a_batch(split: Split) -> None:
    clock = Clock(1, 36, 8, CROPPED)
    for k, batch in enumerate(training_batches(split, clock, 12, range(2, 7), CPU, workers=0), start=2):
        plan = clock.at(k)
        assert batch.step == k and type(batch.step) is int
        assert batch.views.shape == (16, 3, 12, 12) and batch.views.dtype == torch.uint8
        assert batch.views.is_contiguous(memory_format=torch.channels_last)
        assert not batch.views.is_contiguous()
        assert batch.labels is not None and batch.labels.dtype == torch.int64
        assert split.labels is not None
        assert batch.labels.tolist() == split.labels[plan.indices].tolist()
        named = [Path(split.images.name(int(i))).parent.name for i in plan.indices]
        assert named == [("dark", "light")[label] for label in batch.labels]
        expected = to_tensors(plan.photometric, CPU)
        assert all(torch.equal(a, b) for a, b in zip(batch.parameters, expected, strict=True))


def test_without_labels_there_are_none(split: Split) -> None:
    (batch,) = training_batches(Split(split.images, None), Clock(1, 36, 8, CROPPED), 12, range(1), CPU, workers=0)
    assert batch.labels is None


@pytest.mark.parametrize("recipe", ["imagenet-asymmetric", "digits"])
def test_worker_processes_change_nothing(recipe: str, split: Split) -> None:
    clock = Clock(2, 36, 8, AUGMENTATIONS[recipe])
    assert clock.steps_per_epoch == 4
    alone = list(training_batches(split, clock, 16, range(9), CPU, workers=0))
    assert [batch.step for batch in alone] == list(range(9))
    helped = list(training_batches(split, clock, 16, range(9), CPU, workers=2))
    assert len(helped) == 9 and all(map(same, alone, helped))
    assert not torch.equal(alone[0].views, alone[4].views)  # the next epoch is another
    later = list(training_batches(split, clock, 16, range(3, 9), CPU, workers=1))
    assert len(later) == 6 and all(map(same, alone[3:], later))
    assert_no_workers_left()


@pytest.mark.parametrize("recipe", ["imagenet-asymmetric", "digits"])
def test_two_ranks_together_are_one(recipe: str, split: Split) -> None:
    clock = Clock(2, 36, 8, AUGMENTATIONS[recipe])
    steps = range(2, 6)
    whole = training_batches(split, clock, 16, steps, CPU, workers=0)
    ranks = [training_batches(split, clock, 16, steps, CPU, workers=0, rank=r, world_size=2) for r in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        for part in parts:
            assert part.views.shape[0] == 8 and part.step == batch.step

        def joined(values: list[torch.Tensor]) -> torch.Tensor:
            # Each rank's view 1 is followed by its view 2.
            halves = [value.chunk(2) for value in values]
            return torch.cat([half[view] for view in range(2) for half in halves])

        assert torch.equal(batch.views, joined([part.views for part in parts]))
        for k, value in enumerate(batch.parameters):
            assert torch.equal(value, joined([part.parameters[k] for part in parts]))
        assert batch.labels is not None
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts if part.labels is not None]))


def test_an_epoch_sees_each_image_once(split: Split) -> None:
    numbered = Split(split.images, np.arange(36))
    clock = Clock(7, 36, 9, CROPPED)
    seen = [batch.labels for batch in training_batches(numbered, clock, 4, range(4, 8), CPU, workers=0)]
    assert sorted(torch.cat([labels for labels in seen if labels is not None]).tolist()) == list(range(36))


def test_no_steps_no_batches(split: Split) -> None:
    for workers in (0, 2):
        assert list(training_batches(split, Clock(0, 36, 8, CROPPED), 8, range(5, 5), CPU, workers=workers)) == []
    assert_no_workers_left()


def test_affine_maps_need_no_workers_and_crops_take_the_cores() -> None:
    assert auto_workers(AUGMENTATIONS["digits"]) == 0
    assert auto_workers(Augmentation("c", crop=CropRule())) == min(16, max(1, len(os.sched_getaffinity(0)) - 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_replaced_by_the_next_image_of_the_epoch(split: Split, workers: int) -> None:
    clock = Clock(0, 36, 6, CROPPED)
    good = list(training_batches(split, clock, 8, range(12), CPU, workers=0))
    order = np.concatenate([clock.at(step).indices for step in range(6)])
    # Two in a row, the last of the epoch, and another.
    victims = [int(order[i]) for i in (3, 4, 35, 20)]
    for victim, kind in zip(victims, ("truncated", "empty", "truncated", "html"), strict=True):
        damage(Path(split.images.name(victim)), kind)
    lines: list[str] = []
    quarantine = Quarantine(split.images, 0.2, say=lines.append)
    batches = list(training_batches(split, clock, 8, range(12), CPU, workers=workers, quarantine=quarantine))
    assert [batch.step for batch in batches] == list(range(12))
    assert set(quarantine.bad) == set(victims)
    assert len(lines) == 4 and all("cannot be decoded" in line for line in lines)
    assert all(any(split.images.name(victim) in line for line in lines) for victim in victims)
    numbered = Split(split.images, np.arange(36))
    seen = training_batches(numbered, clock, 8, range(6), CPU, workers=0, quarantine=quarantine)
    shown = np.concatenate([batch.labels for batch in seen if batch.labels is not None])
    expected = order.copy()
    expected[3] = expected[4] = order[5]
    expected[35], expected[20] = order[0], order[21]
    assert shown.tolist() == expected.tolist()
    for before, after in zip(good, batches, strict=True):  # no other position has shifted
        replaced = torch.from_numpy(np.isin(clock.at(after.step).indices, victims)).repeat(2)
        assert torch.equal(before.views[~replaced], after.views[~replaced])
        assert all(torch.equal(x, y) for x, y in zip(before.parameters, after.parameters, strict=True))
    assert_no_workers_left()


def test_too_many_bad_files_stop_the_run_and_one_is_named(split: Split) -> None:
    for victim in (3, 17):
        damage(Path(split.images.name(victim)), "truncated")
    for workers in (0, 2):
        with pytest.raises(UsageError) as caught:
            list(training_batches(split, Clock(0, 36, 6, CROPPED), 8, range(6), CPU, workers=workers))
        message = str(caught.value)
        assert "2 of 36 images cannot be decoded" in message and "\n" not in message
        assert split.images.name(3) in message or split.images.name(17) in message
        del caught
    assert_no_workers_left()


def test_a_disk_that_goes_away_stops_the_run(split: Split) -> None:
    for i in range(36):
        Path(split.images.name(i)).unlink()
    with pytest.raises(TemporaryError, match="is the disk still there"):
        list(training_batches(split, Clock(0, 36, 36, CROPPED), 8, range(1), CPU, workers=0))


def test_stopping_early_leaves_no_processes(split: Split) -> None:
    with closing(training_batches(split, Clock(0, 36, 6, CROPPED), 8, range(100), CPU, workers=2)) as batches:
        assert next(batches).step == 0
        assert len(multiprocessing.active_children()) == 2
    assert_no_workers_left()
