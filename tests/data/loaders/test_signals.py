"""Ctrl-C reaches the worker processes, and they go on working until the trainer stops."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from falcon_fast.data.loaders.evaluation import evaluation_batches
from falcon_fast.data.loaders.signals import hold_signals, lost_workers
from falcon_fast.data.loaders.workers import training_batches
from falcon_fast.data.sources.images import Split
from falcon_fast.data.views.augmentation import AUGMENTATIONS
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import TemporaryError

from ...processes import in_processes
from ..images import CPU, assert_no_workers_left


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Python's own handler: a shell ignores SIGINT for its background jobs, and worker processes would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "DataLoader worker (pid 12) is killed by signal: Killed. ",
            ("12 was ended by a signal (Killed)", "memory ran out"),
        ),
        ("DataLoader worker (pid 12) is killed by signal: Bus error. It is ...", ("(Bus error)", "/dev/shm is full")),
        ("DataLoader worker (pid 12) is killed by signal: Segmentation fault. ", ("fault", "data verify")),
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", ("12, 13 ended unexpectedly", "data.workers=N")),
    ],
)
def test_a_lost_worker_is_one_line(text: str, parts: tuple[str, ...]) -> None:
    with pytest.raises(TemporaryError) as caught, lost_workers(lambda: "kept"):
        raise RuntimeError(text)
    line = str(caught.value)
    assert all(part in line for part in parts) and line.endswith("; kept") and "\n" not in line
    with pytest.raises(RuntimeError, match="something else"), lost_workers():
        raise RuntimeError("something else")


def test_a_killed_worker_of_an_evaluation_is_noticed(split: Split, tmp_path: Path) -> None:
    """In a process of its own: torch raises in a signal handler, wherever the main thread is, and later in another test."""
    assert in_processes(_killed, 1, tmp_path, split) == ["memory ran out"]


def _killed(rank: int, world: int, split: Split) -> str:
    with pytest.raises(TemporaryError) as caught, lost_workers():
        for _ in evaluation_batches(split, 8, CPU, batch_size=1, workers=1):
            for process in multiprocessing.active_children():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
    assert_no_workers_left()
    return "memory ran out" if "memory ran out" in str(caught.value) else str(caught.value)


def test_workers_take_no_signal_while_they_start(split: Split) -> None:
    """A group that is signalled while the workers are forked: a worker would run the trainer's handler."""
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: taken.append(os.getpid()))
    try:
        with hold_signals():
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            assert taken == []
        assert taken == [os.getpid()]
        assert len(list(evaluation_batches(split, 8, CPU, batch_size=6, workers=2))) == 6
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGUSR1, signal.SIGINT, signal.SIGTERM}
    finally:
        signal.signal(signal.SIGUSR1, before)


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
