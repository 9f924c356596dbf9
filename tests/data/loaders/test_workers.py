"""The loader of worker processes: its views against torchvision and scipy, and that nothing but the clock decides them."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.workers import auto_workers, training_batches
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Split
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import AUGMENTATIONS, AffineRule, Augmentation, CropRule
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import Clock, affine_matrices, crop_boxes
from falcon_fast.errors import UsageError

from ..images import CPU, damage, same

CROPPED = AUGMENTATIONS["imagenet-asymmetric"]


@pytest.fixture
def split(image_folder: Path) -> Split:
    """36 images of 24 x 20 pixels with two labels."""
    return open_source(DataConfig(path=str(image_folder))).train


@pytest.fixture(scope="module")
def array_split() -> Split:
    """50 images of 16 x 16 pixels in memory."""
    random = np.random.RandomState(3)
    return Split(ImageArray(random.randint(0, 256, (50, 16, 16, 3)).astype(np.uint8)), np.arange(50) % 7)


def assert_no_workers_left() -> None:
    end = time.monotonic() + 5
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.02)
    assert not multiprocessing.active_children()


# ---- crops ----


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


# ---- affine maps ----


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


# ---- who makes a batch and from where on plays no part ----


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


# ---- what goes wrong ----


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
    with pytest.raises(UsageError, match=r"2 of 36 images cannot be decoded.*no such file"):
        list(training_batches(split, Clock(0, 36, 36, CROPPED), 8, range(1), CPU, workers=0))
    with pytest.raises(UsageError, match="none of 36 images can be decoded"):
        list(evaluation_batches(split, 8, CPU, bad={}))


def test_evaluation_names_or_leaves_out_what_it_cannot_decode(split: Split) -> None:
    victim = split.images.name(17)
    whole = torch.cat(list(evaluation_batches(split, 8, CPU, batch_size=5)))
    damage(Path(victim), "truncated")
    for workers in (0, 2):
        with pytest.raises(UsageError) as caught:
            list(evaluation_batches(split, 8, CPU, batch_size=5, workers=workers))
        message = str(caught.value)
        assert victim in message and "cannot be decoded" in message and "\n" not in message
        del caught
        bad: dict[int, str] = {}
        rest = torch.cat(list(evaluation_batches(split, 8, CPU, batch_size=5, workers=workers, bad=bad)))
        assert list(bad) == [17] and torch.equal(rest, torch.cat([whole[:17], whole[18:]]))
        assert split.labels is not None
        without = split.without(bad)
        assert without.labels is not None and without.labels.tolist() == np.delete(split.labels, 17).tolist()
        assert torch.equal(rest, torch.cat(list(evaluation_batches(without, 8, CPU))))
    assert_no_workers_left()


def test_stopping_early_leaves_no_processes(split: Split) -> None:
    with closing(training_batches(split, Clock(0, 36, 6, CROPPED), 8, range(100), CPU, workers=2)) as batches:
        assert next(batches).step == 0
        assert len(multiprocessing.active_children()) == 2
    assert_no_workers_left()
    evaluated = evaluation_batches(split, 8, CPU, batch_size=4, workers=2)
    next(evaluated)
    assert len(multiprocessing.active_children()) == 2
    del evaluated
    assert_no_workers_left()


def test_an_interrupt_of_the_whole_terminal_leaves_the_workers_at_work(split: Split) -> None:
    clock = Clock(0, 36, 6, CROPPED)
    training = training_batches(split, clock, 8, range(40), CPU, workers=2)
    evaluation = evaluation_batches(split, 8, CPU, batch_size=1, workers=2)
    for batches, count in ((training, 40), (evaluation, 36)):
        next(batches), next(batches)  # one of each worker: both are past their start
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)
        assert len(list(batches)) == count - 2
    assert_no_workers_left()


# ---- evaluation ----


def test_evaluation_goes_through_all_in_order(array_split: Split) -> None:
    assert isinstance(array_split.images, ImageArray)
    for workers in (0, 2):
        batches = list(evaluation_batches(array_split, 16, CPU, batch_size=16, workers=workers))
        assert [len(batch) for batch in batches] == [16, 16, 16, 2]
        for batch in batches:
            assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 16, 16)
            assert batch.is_contiguous(memory_format=torch.channels_last)
        whole = torch.cat(batches).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(whole, array_split.images.pixels)


def evaluated(images: list[Image.Image], size: int, tmp_path: Path) -> list[np.ndarray]:
    for i, image in enumerate(images):
        image.save(tmp_path / f"{i}.png")
    files = Split(ImageFiles(tuple(str(tmp_path / f"{i}.png") for i in range(len(images)))), None)
    (batch,) = evaluation_batches(files, size, CPU)
    return list(batch.permute(0, 2, 3, 1).numpy())


def torchvisions(image: Image.Image, size: int, crop: int) -> np.ndarray:
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose([v2.Resize(size, InterpolationMode.BICUBIC), v2.CenterCrop(crop)])
    return np.asarray(transform(image))


def noise(width: int, height: int) -> Image.Image:
    random = np.random.RandomState(width * 1000 + height)
    small = Image.fromarray(random.randint(0, 256, (9, 9, 3)).astype(np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def test_evaluation_at_224_takes_the_middle_of_256_as_torchvision_does(tmp_path: Path) -> None:
    images = [noise(512, 256), noise(256, 384), noise(600, 400), noise(333, 227), noise(128, 161), noise(256, 256)]
    for image, ours in zip(images, evaluated(images, 224, tmp_path), strict=True):
        assert np.array_equal(ours, torchvisions(image, 256, 224)), image.size


def test_small_views_take_the_whole_short_side(tmp_path: Path) -> None:
    images = [noise(64, 32), noise(32, 48), noise(100, 50), noise(20, 20), noise(95, 95)]
    for image, ours in zip(images, evaluated(images, 32, tmp_path), strict=True):
        assert np.array_equal(ours, torchvisions(image, 32, 32)), image.size
    at = {size: evaluated([noise(256, 256)], size, tmp_path)[0] for size in (95, 96)}
    assert np.array_equal(at[95], torchvisions(noise(256, 256), 95, 95))
    assert np.array_equal(at[96], torchvisions(noise(256, 256), 110, 96))


def test_images_of_the_size_itself_are_taken_as_they_are(tmp_path: Path) -> None:
    for size in (16, 224):
        assert np.array_equal(evaluated([noise(size, size)], size, tmp_path)[0], np.asarray(noise(size, size)))


def test_awkward_shapes_still_give_whole_views(tmp_path: Path) -> None:
    images = [noise(1, 1), noise(1, 9), noise(9, 1), noise(257, 3), noise(333, 227)]
    for size in (7, 96):
        assert [view.shape for view in evaluated(images, size, tmp_path)] == [(size, size, 3)] * 5


def test_evaluation_of_photographs_is_torchvisions(shared: Path) -> None:
    paths = sorted((shared / "data" / "imagenet-sample").rglob("*.JPEG"))[::8]
    files = ImageFiles(tuple(map(str, paths)))
    for size, resized in ((224, 256), (64, 64)):
        (batch,) = evaluation_batches(Split(files, None), size, CPU)
        for i, view in enumerate(batch.permute(0, 2, 3, 1).numpy()):
            assert np.array_equal(view, torchvisions(files.image(i), resized, size)), files.name(i)
