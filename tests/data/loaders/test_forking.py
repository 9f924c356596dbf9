"""Worker processes do not collect the garbage of the process that they are forked from."""

from __future__ import annotations

import gc
import os

from torch.utils.data import DataLoader, Dataset

from falcon_fast.data.loaders.forking import started


class Pipeline:
    """Garbage that must be collected where it was made."""

    def __init__(self) -> None:
        self.cycle = self

    def __del__(self) -> None:
        Numbers.collected_by.append(os.getpid())


class Numbers(Dataset[list[int]]):
    collected_by: list[int] = []  # noqa: RUF012

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> list[int]:
        gc.collect()
        return list(self.collected_by)


def test_a_worker_leaves_the_garbage_of_its_parent_alone() -> None:
    gc.collect()
    gc.disable()  # so that it is garbage still when the worker is forked
    try:
        Numbers.collected_by.clear()
        Pipeline()
        loader = DataLoader(Numbers(), batch_size=None, num_workers=1)
        assert list(started(loader)) == [[]]
        gc.collect()
        assert Numbers.collected_by == [os.getpid()]
    finally:
        gc.enable()
