"""Ctrl-C reaches the worker processes, and they go on working until the trainer stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator

import pytest

from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.loaders.workers import training_batches
from falcon_fast.data.sources.images import Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock

from ..images import CPU, assert_no_workers_left


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Python's own handler: a shell ignores SIGINT for its background jobs, and worker processes would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_of_the_whole_terminal_leaves_the_workers_at_work(split: Split) -> None:
    clock = Clock(0, 36, 6, AUGMENTATIONS["imagenet-asymmetric"])
    training = training_batches(split, clock, 8, range(40), CPU, workers=2)
    evaluation = evaluation_batches(split, 8, CPU, batch_size=1, workers=2)
    for batches, count in ((training, 40), (evaluation, 36)):
        next(batches), next(batches)  # one of each worker: both are past their start
        for process in multiprocessing.active_children():
            assert process.pid is not None
            os.kill(process.pid, signal.SIGINT)
        assert len(list(batches)) == count - 2
    assert_no_workers_left()
