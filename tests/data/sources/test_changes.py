"""Image files that change during a run are named and counted."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from falcon_fast.config import DataConfig
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.data.sources.changes import NAMED, Changes, change_of, changes_of
from falcon_fast.data.sources.images import ImageArray
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock

from ..images import CPU, smooth


def test_size_and_time_of_change_tell(image_folder: Path) -> None:
    images = open_source(DataConfig(path=str(image_folder))).train.images
    assert changes_of(images, range(len(images))) == {}
    first, second, third = (Path(images.name(i)) for i in range(3))
    size = first.stat().st_size
    first.write_bytes(first.read_bytes() + b"more")
    second.write_bytes(second.read_bytes())
    os.utime(second, ns=(0, 1))
    third.unlink()  # reading it says so
    assert changes_of(images, range(len(images))) == {0: f"{size:,} bytes became {size + 4:,}", 1: "written again"}


def test_a_selection_looks_at_the_right_files(image_folder: Path) -> None:
    split = open_source(DataConfig(path=str(image_folder))).train
    chosen = split.without({0, 1}).images
    path = Path(split.images.name(5))
    path.write_bytes(path.read_bytes() + b"more")
    assert change_of(chosen, 3) and not change_of(chosen, 5)


def test_each_file_is_named_once_up_to_ten_and_all_are_counted(image_folder: Path) -> None:
    images, lines = open_source(DataConfig(path=str(image_folder))).train.images, []
    changes = Changes(images, lines.append)
    changes.look()
    assert lines == [] and changes.summary() == ""
    for index in range(NAMED + 3):
        path = Path(images.name(index))
        path.write_bytes(path.read_bytes() + b"more")
    for _ in range(2):
        changes.look()
    assert len(lines) == NAMED and all("has changed since the run began" in line for line in lines)
    assert changes.summary().startswith(f"{NAMED + 3} image files changed during the run")
    arrays = Changes(ImageArray(np.zeros((3, 2, 2, 3), np.uint8)), lines.append)
    arrays.look()
    assert arrays.seen == {}


@pytest.mark.parametrize("loader", ["workers", "resident", "dali"])
def test_every_loader_names_a_file_that_was_replaced(loader: str, tmp_path: Path) -> None:
    """Before the loader starts: all of them read it then. (The resident loader reads each file once.)"""
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    for i in range(24):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(64, 48, i).save(path)
    source = open_source(DataConfig(path=str(tmp_path / "photos"), size=24))
    images, lines = source.train.images, []
    smooth(64, 48, 99).save(images.name(7), quality=30)
    quarantine = Quarantine(images, say=lines.append)
    clock = Clock(0, len(images), 4, AUGMENTATIONS["imagenet-asymmetric"])
    steps = range(clock.steps_per_epoch)
    workers = 1 if loader == "workers" else 0
    assert len(list(training_batches(loader, source, clock, steps, CPU, workers, quarantine=quarantine))) == len(steps)
    shown = set(np.concatenate([clock.at(step).indices for step in steps]).tolist())
    if loader == "resident" or 7 in shown:
        (line,) = lines
        assert line.startswith(images.name(7)) and list(quarantine.changes.seen) == [7]
    assert loader == "resident" or 7 in shown, "choose another image: this one is not shown in the first epoch"
