"""Batches of worker processes where /dev/shm has room for them, and where it has not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from falcon_fast.data.loaders import shared_memory
from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.workers import training_batches
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock

from ..images import CPU, same

Statvfs = namedtuple("Statvfs", "f_bavail f_frsize f_blocks")


class Items(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[str, torch.Tensor | np.ndarray]:
        item = shared_memory.handed_over(torch.full((1000,), index))
        return type(item).__name__, item


def sent() -> list[tuple[str, torch.Tensor | np.ndarray]]:
    return list(DataLoader(Items(), batch_size=None, num_workers=1, collate_fn=lambda item: item))


def free(monkeypatch, size: int) -> None:
    monkeypatch.setattr(shared_memory.os, "statvfs", lambda path: Statvfs(size, 1, size))


def test_a_batch_takes_at_most_half_of_what_is_free(monkeypatch) -> None:
    for size, kind in ((16000, "Tensor"), (15999, "ndarray")):  # an item has 8,000 bytes
        free(monkeypatch, size)
        items = sent()
        assert [name for name, _ in items] == [kind] * 3
        for index, (_, item) in enumerate(items):
            assert torch.equal(shared_memory.received(item), torch.full((1000,), index))


def test_a_batch_that_cannot_be_shared_after_all_goes_through_the_pipe(monkeypatch) -> None:
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert [name for name, _ in sent()] == ["ndarray"] * 3


def test_outside_of_a_worker_nothing_is_shared() -> None:
    tensor = torch.ones(3)
    assert shared_memory.handed_over(tensor) is tensor and not tensor.is_shared()


def test_the_loaders_give_the_same_batches_without_shared_memory(split, monkeypatch) -> None:
    clock = Clock(0, 36, 6, AUGMENTATIONS["imagenet-asymmetric"])

    def both(lines: list[str]) -> tuple[list, list]:
        quarantine = Quarantine(split.images, say=lines.append)
        training = training_batches(split, clock, 8, range(6), CPU, workers=2, quarantine=quarantine)
        return list(training), list(evaluation_batches(split, 8, CPU, batch_size=10, workers=2))

    shared, piped = [], []
    expected = both(shared)
    free(monkeypatch, 1000)
    found = both(piped)
    assert all(same(a, b) for a, b in zip(found[0], expected[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))
    assert shared == [] and len(piped) == 1 and "/dev/shm" in piped[0] and "--shm-size" in piped[0]


def test_info_tells_how_much_there_is(monkeypatch) -> None:
    free(monkeypatch, 2**26)
    assert (
        "64 of 64 MiB are free in /dev/shm" in shared_memory.described() and "--shm-size" in shared_memory.described()
    )
    free(monkeypatch, 2**34)
    assert "--shm-size" not in shared_memory.described()
    monkeypatch.setattr(shared_memory, "DIRECTORY", "/nowhere")
    monkeypatch.undo()
    monkeypatch.setattr(shared_memory, "DIRECTORY", "/nowhere")
    assert "there is no /nowhere" in shared_memory.described()


SMALL = """
import sys, numpy as np, torch
from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.sources.images import ImageArray, Split
split = Split(ImageArray(np.arange(600 * 96 * 96 * 3, dtype=np.uint8).reshape(600, 96, 96, 3)), None)
print(sum(len(batch) for batch in evaluation_batches(split, 96, torch.device("cpu"), workers=2)))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_an_evaluation_in_a_container_with_little_shared_memory_goes_on() -> None:
    """8 MiB of /dev/shm; a batch of 256 images has 6.75 MiB. It waited for ever."""
    mount = 'mount -t tmpfs -o size=8m tmpfs /dev/shm && exec "$0" -c "$1"'
    command = ["unshare", "-rm", "bash", "-c", mount, sys.executable, SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip(f"no mounting here: {done.stderr}")
    assert done.stdout.strip() == "600", done.stderr
