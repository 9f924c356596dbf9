"""SVHN: its original files, folders of its images, and damaged files."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from ...fuzz import COUNTS, MIB, fuzz, mutated
from .opened import drawn, opened, pixels, refused, write_class_folders

SVHN = {"train": drawn(40, 10, 2), "test": drawn(20, 10, 3)}


def write_svhn(root: Path, compress: bool = False) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for split, (images, labels) in SVHN.items():
        content = {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)}
        savemat(root / f"{split}_32x32.mat", content, do_compression=compress)
    return root


def test_svhn_in_its_original_files_and_in_folders(tmp_path: Path) -> None:
    source = opened("svhn", write_svhn(tmp_path / "mat"))
    for split, (images, labels) in ((source.train, SVHN["train"]), (source.test, SVHN["test"])):
        assert np.array_equal(pixels(split), images)
        assert split.labels is not None and split.labels.dtype == np.int64
        assert np.array_equal(split.labels, labels)  # 10 is the digit 0
    assert source.classes == tuple("0123456789") and source.size == 32
    folders = opened("svhn", write_class_folders(tmp_path / "f", SVHN, str))
    assert folders.classes == source.classes
    assert folders.train.labels is not None and sorted(folders.train.labels) == sorted(SVHN["train"][1])


def test_a_damaged_or_missing_svhn_file_is_named(tmp_path: Path, image_folder: Path) -> None:
    root = write_svhn(tmp_path / "mat")
    content = (root / "test_32x32.mat").read_bytes()
    (root / "test_32x32.mat").write_bytes(content[:500])
    assert "test_32x32.mat is not a readable SVHN file" in refused("svhn", root)
    (root / "test_32x32.mat").unlink()
    assert "test_32x32.mat is not a readable SVHN file" in refused("svhn", root)
    assert "needs train_32x32.mat and test_32x32.mat" in refused("svhn", image_folder)


def unpacked_mutated(data: bytes, chance: random.Random) -> bytes:
    """A file whose variables are changed and then packed again, so that what is wrong is found behind zlib."""
    parts, at = [data[:128]], 128
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        content = zlib.decompress(data[at + 8 : at + 8 + length])
        packed = zlib.compress(mutated(content, chance) if chance.random() < 0.7 else content, 1)
        parts += [struct.pack("<II", 15, len(packed)), packed]
        at += 8 + length
    return b"".join(parts)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "compressed"])
def test_mutations_are_read_or_refused_in_one_line(tmp_path: Path, compress: bool, count: int) -> None:
    root = write_svhn(tmp_path / "mat", compress)
    mutations = (mutated, unpacked_mutated) if compress else (mutated,)
    name = f"svhn, {'compressed' if compress else 'plain'}"
    outcome = fuzz(
        lambda: opened("svhn", root), sorted(root.iterdir()), count, name=name, mutations=mutations, memory=32 * MIB
    )
    assert outcome.refused > count // 4
