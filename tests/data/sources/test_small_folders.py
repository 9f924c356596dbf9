"""Folders of 32 x 32 images in place of original files: decoded into memory, and what does not belong there is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from falcon_fast.data.sources.images import ImageArray
from falcon_fast.data.sources.small_folders import open_small_folders
from falcon_fast.errors import UsageError

from .opened import drawn, pixels, save, write_class_folders

SETS = {"train": drawn(30, 10, 5), "test": drawn(20, 10, 6)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "small", SETS, lambda label: f"c{label}")


def refused_here(root: Path, classes: int = 10) -> str:
    with pytest.raises(UsageError) as caught:
        open_small_folders(root, "TINY", classes, "a.bin and b.bin")
    return str(caught.value)


def test_both_splits_lie_in_memory_with_their_labels(root: Path) -> None:
    train, test, classes, notes = open_small_folders(root, "TINY", 10, "a.bin")
    assert classes == tuple(f"c{k}" for k in range(10))
    assert notes == ("training split train/ (30 images in 10 classes), test split test/ (20 images in 10 classes)",)
    for split, (images, labels) in ((train, SETS["train"]), (test, SETS["test"])):
        assert isinstance(split.images, ImageArray) and split.labels is not None
        ours = sorted((int(k), x.tobytes()) for k, x in zip(split.labels, pixels(split), strict=True))
        assert ours == sorted((int(k), x.tobytes()) for k, x in zip(labels, images, strict=True))


def test_another_number_of_classes_names_what_is_needed(root: Path) -> None:
    assert "is not TINY: it needs a.bin and b.bin (original files)" in refused_here(root, 100)


def test_another_size_and_a_damaged_image_are_named(root: Path) -> None:
    victim = next((root / "test" / "c3").iterdir())
    healthy = victim.read_bytes()
    victim.write_bytes(healthy[:1500])  # the header is whole: it opens, and does not decode
    assert f"{victim} cannot be decoded" in refused_here(root)
    victim.write_bytes(healthy)
    save(root / "train" / "c3" / "large.png", size=(33, 32))
    assert "its images must be 32 x 32; for other sizes use --recipe folder" in refused_here(root)
