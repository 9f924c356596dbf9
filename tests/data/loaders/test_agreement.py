"""All loaders show the same pixels of every kind of file, and list the same bad files with the same reasons."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.data.sources.decoding import header_size
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.images import ImageFiles, Source, Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import TemporaryError

from ..images import CPU, same, smooth, write_every_kind
from ..odd_images import bad_files, good_files, special_files

RECIPE = AUGMENTATIONS["imagenet-asymmetric"]
LOADERS = ("workers", "resident", "dali")


def split_of(paths: list[Path]) -> Split:
    sizes = []
    for path in paths:
        try:
            sizes.append(header_size(path))
        except BadImage:
            sizes.append((0, 0))
    return Split(ImageFiles(tuple(map(str, paths)), tuple(sizes)), np.arange(len(paths)))


def batches_of(
    loader: str, split: Split, clock: Clock, steps: range, quarantine: Quarantine, workers: int = 0
) -> Iterator:
    source = Source(split, split, (), 24, (0.5,) * 3, (0.5,) * 3, "")
    return training_batches(loader, source, clock, steps, CPU, workers, quarantine=quarantine)


def test_odd_but_good_files_have_the_same_pixels_in_every_loader(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    for name, contents in good_files().items():
        (tmp_path / name).write_bytes(contents)
    split = split_of(sorted(tmp_path.iterdir()))
    n = len(split.images)
    clock = Clock(3, n, n, RECIPE)
    theirs = None
    for loader in LOADERS:
        quarantine = Quarantine(split.images)
        ours = list(batches_of(loader, split, clock, range(2), quarantine))
        assert quarantine.bad == {}
        assert theirs is None or all(map(same, ours, theirs)), loader
        theirs = ours


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Split, dict[str, str]]:
    """Good files of every kind, bad ones and some that are no files; and for each bad one a part of the reason."""
    root = tmp_path / "mixed"
    write_every_kind(root)
    reasons = special_files(root)
    for name, contents in good_files().items():
        (root / name).write_bytes(contents)
    for name, (contents, reason) in bad_files().items():
        (root / name).write_bytes(contents)
        reasons[name] = reason
    return split_of(sorted(root.iterdir())), reasons


@pytest.mark.parametrize("seed", [1, 5])
def test_every_loader_lists_the_same_bad_files_whatever_the_order(
    seed: int, mixed: tuple[Split, dict[str, str]], tmp_path: Path
) -> None:
    pytest.importorskip("nvidia.dali")
    split, reasons = mixed
    clock = Clock(seed, len(split.images), 5, RECIPE)
    steps = range(2 * clock.steps_per_epoch)  # an epoch drops up to four images, the next one others
    lists = []
    first: list = []
    for loader, workers in (("workers", 0), ("workers", 2), ("dali", 0), ("resident", 0)):
        path = tmp_path / f"{loader}{workers}.csv"
        quarantine = Quarantine(split.images, 0.9, path)
        ours = list(batches_of(loader, split, clock, steps, quarantine, workers))
        first = first or ours
        assert len(ours) == len(steps) and all(map(same, ours, first)), loader
        with path.open(newline="") as file:
            lists.append({(row["image"], row["file"], row["reason"]) for row in csv.DictReader(file)})
    assert lists[0] == lists[1] == lists[2]
    # The resident loader decodes all images at the start, also those that these epochs drop.
    assert lists[0] <= lists[3]
    found = {Path(file).name: reason for _, file, reason in lists[3]}
    assert found.keys() == reasons.keys()
    assert not [name for name in reasons if reasons[name] not in found[name]]


@pytest.mark.parametrize("seed", range(4))
def test_a_bad_file_that_was_read_ahead_is_listed_though_the_pipeline_starts_again(seed: int, tmp_path: Path) -> None:
    """DALI alone cannot decode one file, at which it starts again; the files that are read ahead then are bad."""
    pytest.importorskip("nvidia.dali")
    for i in range(24):
        smooth(30, 20, i).save(tmp_path / f"{i:02d}.png")
    clock = Clock(seed, 24, 2, RECIPE)
    order = np.concatenate([clock.at(step).indices for step in range(12)])
    (tmp_path / f"{order[6]:02d}.png").write_bytes(good_files()["pixels-checksum.png"])
    bad = bad_files()
    for place, name in ((8, "empty.jpg"), (11, "truncated.png"), (13, "broken-pixels.png"), (14, "text.jpg")):
        (tmp_path / f"{order[place]:02d}.png").write_bytes(bad[name][0])
    split = split_of(sorted(tmp_path.iterdir()))
    found = []
    for loader in ("dali", "workers"):
        quarantine = Quarantine(split.images, 0.5)
        batches = batches_of(loader, split, clock, range(12), quarantine)
        seen = []
        for _ in batches:
            seen.append(dict(quarantine.bad))  # listed when the step is handed over, not when it was read ahead
        found.append(seen)
    assert found[0] == found[1]
    assert set(found[0][-1]) == {int(order[place]) for place in (8, 11, 13, 14)}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_fails_stops_every_loader_and_nothing_is_set_aside(
    loader: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    (tmp_path / "data").mkdir()
    for i in range(20):
        smooth(30, 20, i).save(tmp_path / "data" / f"{i:02d}.jpg")
    split = split_of(sorted((tmp_path / "data").iterdir()))
    quarantine = Quarantine(split.images, 0.5, tmp_path / "quarantine.csv")
    (tmp_path / "data").rename(tmp_path / "away")
    with pytest.raises(
        TemporaryError, match=r"data/\d\d\.jpg cannot be read: No such file .*ENOENT.*is the disk still there"
    ):
        list(batches_of(loader, split, Clock(0, 20, 5, RECIPE), range(4), quarantine, workers))
    assert quarantine.bad == {} and not (tmp_path / "quarantine.csv").exists()
    # One file alone that is gone is a bad one.
    (tmp_path / "away").rename(tmp_path / "data")
    (tmp_path / "data" / "07.jpg").unlink()
    assert len(list(batches_of(loader, split, Clock(0, 20, 5, RECIPE), range(4), quarantine, workers))) == 4
    assert quarantine.bad == {7: "no such file"}
    # All files gone from a folder that is there: an empty mount point.
    for path in (tmp_path / "data").iterdir():
        path.unlink()
    with pytest.raises(TemporaryError, match="and so are 16 others that were looked at"):
        list(batches_of(loader, split, Clock(0, 20, 5, RECIPE), range(4), Quarantine(split.images, 0.5), workers))


@pytest.mark.parametrize("loader", LOADERS)
def test_memory_that_runs_out_makes_no_image_bad(loader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    from PIL import ImageFile

    for i in range(8):
        smooth(30, 20, i).save(tmp_path / f"{i}.bmp")
    split = split_of(sorted(tmp_path.iterdir()))

    def short(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", short)
    quarantine = Quarantine(split.images, 0.5)
    with pytest.raises(TemporaryError, match=r"memory ran out while .*\d\.bmp was decoded: .*data\.workers"):
        list(batches_of(loader, split, Clock(0, 8, 4, RECIPE), range(2), quarantine))
    assert quarantine.bad == {}


def test_more_workers_than_images_or_steps_change_nothing(tmp_path: Path) -> None:
    for i in range(6):
        smooth(30, 20, i).save(tmp_path / f"{i}.png")
    split = split_of(sorted(tmp_path.iterdir()))
    clock = Clock(0, 6, 3, RECIPE)
    alone, many = (list(batches_of("workers", split, clock, range(4), Quarantine(split.images), n)) for n in (0, 16))
    assert len(many) == 4 and all(map(same, alone, many))
