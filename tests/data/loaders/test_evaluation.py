"""Batches for evaluation: all images once, in order; what cannot be decoded is named or left out."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch

from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Split
from falcon_fast.errors import TemporaryError, UsageError

from ..images import CPU, assert_no_workers_left, damage, torchvisions


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


def test_evaluation_of_photographs_is_torchvisions(shared: Path) -> None:
    paths = sorted((shared / "data" / "imagenet-sample").rglob("*.JPEG"))[::8]
    files = ImageFiles(tuple(map(str, paths)))
    for size, resized in ((224, 256), (64, 64)):
        (batch,) = evaluation_batches(Split(files, None), size, CPU)
        for i, view in enumerate(batch.permute(0, 2, 3, 1).numpy()):
            assert np.array_equal(view, torchvisions(files.image(i), resized, size)), files.name(i)


def test_a_disk_that_goes_away_stops_the_evaluation(split: Split) -> None:
    for i in range(36):
        Path(split.images.name(i)).unlink()
    for workers in (0, 2):
        bad: dict[int, str] = {}
        with pytest.raises(TemporaryError, match="is the disk still there"):
            list(evaluation_batches(split, 8, CPU, bad=bad, workers=workers))
        assert bad == {}


def test_an_evaluation_of_damaged_images_alone_says_so(split: Split) -> None:
    for i in range(36):
        damage(Path(split.images.name(i)), "html")
    with pytest.raises(UsageError, match="none of 36 images can be decoded"):
        list(evaluation_batches(split, 8, CPU, bad={}))


def test_stopping_early_leaves_no_processes(split: Split) -> None:
    evaluated = evaluation_batches(split, 8, CPU, batch_size=4, workers=2)
    next(evaluated)
    assert len(multiprocessing.active_children()) == 2
    del evaluated
    assert_no_workers_left()
