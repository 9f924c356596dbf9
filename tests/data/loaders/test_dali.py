"""The DALI loader: the pixels of Pillow's loader, the clock's numbers and nothing else, and files that end its pipeline."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from falcon_fast.data.loaders import dali, workers
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.sources.decoding import header_size, read_image
from falcon_fast.data.sources.images import ImageFiles, Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.photometric import to_tensors
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import TrainingError, UsageError

from ..images import CPU, damage, joined, same, smooth, write_every_kind

pytest.importorskip("nvidia.dali")


RECIPE = AUGMENTATIONS["imagenet-asymmetric"]


def split_of(paths: list[Path]) -> Split:
    files = ImageFiles(tuple(map(str, paths)), tuple(map(header_size, paths)))
    return Split(files, np.arange(len(paths)) % 5)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return split_of(write_every_kind(tmp_path_factory.mktemp("kinds")))


@pytest.fixture
def photos(tmp_path: Path) -> Split:
    """36 JPEGs of different sizes."""
    paths = []
    for i in range(36):
        paths.append(tmp_path / f"{i:02d}.jpg")
        smooth(40 + i, 70 - i, seed=i).save(paths[-1], quality=95)
    return split_of(paths)


def check_parity(split: Split, batch_size: int, size: int, steps: range) -> None:
    clock = Clock(11, len(split.images), batch_size, RECIPE)
    ours = dali.training_batches(split, clock, size, steps, CPU)
    theirs = workers.training_batches(split, clock, size, steps, CPU, workers=0)
    for a, b in zip(ours, theirs, strict=True):
        assert same(a, b)


def test_every_kind_of_file_looks_as_pillow_sees_it(kinds: Split) -> None:
    n = len(kinds.images)
    assert n == 36
    check_parity(kinds, n, 32, range(2))  # the regions are enlarged and reduced
    check_parity(kinds, n, 64, range(2, 3))


def test_what_is_reduced_along_one_side_alone_is_pillows(tmp_path: Path) -> None:
    """Where Pillow 13 takes the columns first; of a dithered picture what is cut in between depends on it."""
    for name, sides in (("tall", (30, 300)), ("wide", (300, 30))):
        smooth(*sides).convert("1").save(tmp_path / f"{name}.png")
        smooth(*sides).save(tmp_path / f"{name}.jpg")
    check_parity(split_of(sorted(tmp_path.iterdir())), 4, 32, range(4))


def test_whole_images_decode_to_the_pixel(kinds: Split) -> None:
    """Without a resize in between: crops of the images' own size are the images."""
    recipe = dataclasses.replace(RECIPE, crop=dataclasses.replace(RECIPE.crop, scale=(1.0, 1.0), ratio=(1.0, 1.0)))
    paths = [Path(path) for path in kinds.images.paths]  # type: ignore[attr-defined]
    square = paths[0].parent.parent / "square"
    split = split_of(write_every_kind(square, 48, 48))
    n = len(split.images)
    (batch,) = dali.training_batches(split, Clock(1, n, n, recipe), 48, range(1), CPU)
    plan = Clock(1, n, n, recipe).at(0)
    for view in range(2):
        for i, index in enumerate(plan.indices):
            expected = np.asarray(read_image(split.images.paths[index]))  # type: ignore[attr-defined]
            expected = expected[:, ::-1] if plan.flips[view, i] else expected
            ours = batch.views[view * n + i].permute(1, 2, 0).numpy()
            assert np.array_equal(ours, expected), split.images.name(int(index))


def test_crops_of_photographs_are_those_of_the_workers(shared: Path) -> None:
    paths = sorted((shared / "data" / "imagenet-sample").rglob("*.JPEG"))[::4]
    check_parity(split_of(paths), len(paths), 224, range(1))


def test_the_contract_of_a_batch(photos: Split) -> None:
    clock = Clock(1, 36, 8, RECIPE)
    for k, batch in enumerate(dali.training_batches(photos, clock, 12, range(2, 7), CPU), start=2):
        plan = clock.at(k)
        assert batch.step == k and type(batch.step) is int
        assert batch.views.shape == (16, 3, 12, 12) and batch.views.dtype == torch.uint8
        assert batch.views.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels is not None and batch.labels.tolist() == (plan.indices % 5).tolist()
        expected = to_tensors(plan.photometric, CPU)
        assert all(torch.equal(a, b) for a, b in zip(batch.parameters, expected, strict=True))


def test_a_batch_stays_as_it_is_when_later_ones_come(photos: Split) -> None:
    batches = dali.training_batches(photos, Clock(1, 36, 8, RECIPE), 12, range(12), CPU)
    first = next(batches)
    before = first.views.clone()
    assert len(list(batches)) == 11
    assert torch.equal(first.views, before)


def test_starting_later_and_other_numbers_of_ranks_change_nothing(photos: Split) -> None:
    clock = Clock(2, 36, 8, RECIPE)
    whole = list(dali.training_batches(photos, clock, 16, range(9), CPU))
    assert [batch.step for batch in whole] == list(range(9))
    later = list(dali.training_batches(photos, clock, 16, range(5, 9), CPU))
    assert len(later) == 4 and all(map(same, whole[5:], later))
    for world in (2, 4):
        ranks = [
            dali.training_batches(photos, clock, 16, range(3, 6), CPU, rank=r, world_size=world) for r in range(world)
        ]
        for batch, *parts in zip(whole[3:6], *ranks, strict=True):
            assert same(batch, joined(parts))


def test_stopping_early_leaves_no_threads(photos: Split) -> None:
    before = threading.active_count()
    with closing(dali.training_batches(photos, Clock(0, 36, 6, RECIPE), 8, range(100), CPU)) as batches:
        next(batches)
    assert threading.active_count() <= before
    assert list(dali.training_batches(photos, Clock(0, 36, 6, RECIPE), 8, range(3, 3), CPU)) == []


@pytest.mark.parametrize("world", [1, 2])
def test_bad_files_are_replaced_in_place(photos: Split, world: int) -> None:
    paths = [Path(path) for path in photos.images.paths]  # type: ignore[attr-defined]
    clock = Clock(4, 36, 12, RECIPE)
    good = list(dali.training_batches(photos, clock, 16, range(6), CPU))
    for victim, kind in ((3, "zeroed"), (17, "truncated"), (8, "empty"), (20, "html"), (21, "gif")):
        damage(paths[victim], kind)
    paths[30].unlink()
    bad = {3, 8, 17, 20, 21, 30}

    def run(loader, **options) -> tuple[list, list[Quarantine]]:
        kept = [Quarantine(photos.images, 0.5, known=options.get("known")) for _ in range(world)]
        ranks = [
            loader.training_batches(photos, clock, 16, range(6), CPU, rank=r, world_size=world, quarantine=kept[r])
            for r in range(world)
        ]
        return [joined(list(parts)) for parts in zip(*ranks, strict=True)], kept

    found, quarantines = run(dali)
    assert set().union(*(q.bad for q in quarantines)) == bad
    assert "no such file" in {**quarantines[0].bad, **quarantines[-1].bad}[30]
    # Known beforehand or found on the way: the same views.
    known, _ = run(dali, known=dict.fromkeys(bad, "known"))
    assert len(found) == len(known) == 6 and all(map(same, found, known))
    by_workers, _ = run(workers)
    for step, (ours, theirs, before) in enumerate(zip(found, by_workers, good, strict=True)):
        assert same(ours, theirs)
        replaced = np.isin(clock.at(step).indices, list(bad))
        unchanged = torch.from_numpy(~np.concatenate([replaced, replaced]))
        assert torch.equal(ours.views[unchanged], before.views[unchanged])  # no other position has shifted


def test_what_only_dali_cannot_decode_is_shown_all_the_same(photos: Split) -> None:
    """A PNG whose end is missing, but for the letters IEND behind it."""
    path = Path(photos.images.paths[5])  # type: ignore[attr-defined]
    smooth(45, 65).save(path, "PNG")
    path.write_bytes(path.read_bytes()[:-10] + b"....IEND")
    read_image(str(path))
    quarantine = Quarantine(photos.images)
    clock = Clock(0, 36, 36, RECIPE)
    (ours,) = dali.training_batches(photos, clock, 24, range(1), CPU, quarantine=quarantine)
    (theirs,) = workers.training_batches(photos, clock, 24, range(1), CPU, workers=0)
    assert not quarantine.bad
    assert same(ours, theirs)


def test_a_file_that_changes_its_size_is_cropped_as_it_is_now(photos: Split) -> None:
    clock = Clock(0, 36, 36, RECIPE)
    smooth(90, 30).save(photos.images.paths[7])  # type: ignore[attr-defined]
    (ours,) = dali.training_batches(photos, clock, 24, range(1), CPU)
    (theirs,) = workers.training_batches(photos, clock, 24, range(1), CPU, workers=0)
    assert same(ours, theirs)


def test_too_many_bad_files_stop_the_run(photos: Split, tmp_path: Path) -> None:
    for victim in (3, 5, 7):
        damage(Path(photos.images.paths[victim]), "truncated")  # type: ignore[attr-defined]
    quarantine = Quarantine(photos.images, 0.06, path=tmp_path / "quarantine.csv")
    with pytest.raises(UsageError, match=r"3 of 36 images cannot be decoded.*max_bad_fraction 0\.06"):
        list(dali.training_batches(photos, Clock(0, 36, 9, RECIPE), 8, range(4), CPU, quarantine=quarantine))
    assert len((tmp_path / "quarantine.csv").read_text().splitlines()) == 4


def test_a_failure_without_a_bad_image_is_no_quarantine(photos: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    from nvidia.dali import Pipeline

    def failing(self: object, *_: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(dali._Loader, "_decodes", lambda self, data: True)
    monkeypatch.setattr(Pipeline, "run", failing)
    with pytest.raises(TrainingError, match="no particular image: out of memory"):
        next(dali.training_batches(photos, Clock(0, 36, 9, RECIPE), 8, range(4), CPU))
