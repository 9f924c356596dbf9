"""What the processes of a run tell each other, and how they meet."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from falcon_fast.errors import RunStopped, SystemFault, TemporaryError, UsageError
from falcon_fast.training.distributed import signals
from falcon_fast.training.distributed.processes import Processes, join
from falcon_fast.training.distributed.stopping import everywhere, speaks

from ...processes import in_processes


def _two_processes(rank, world):
    processes = Processes(rank, world, rank, dist.group.WORLD, dist.new_group(backend="gloo"), 60)
    found = {
        "main": processes.main,
        "everyone": processes.everyone(rank + 1),
        "from_main": processes.from_main(rank + 5),
    }
    found["mean"] = processes.mean(torch.tensor([1.0, 2.0]) * (rank + 1)).tolist()
    found["least"] = int(processes.least(torch.tensor(7 - rank)))
    # What one process alone finds wrong, all say.
    for error in (
        UsageError("no such thing"),
        OSError(28, "No space left on device"),
        FileNotFoundError(2, "gone"),
        TemporaryError("away"),
    ):
        try:
            with processes.together():
                if rank == 1:
                    raise error
        except (UsageError, TemporaryError, OSError) as raised:
            found[type(error).__name__] = (type(raised).__name__, str(raised), everywhere(raised))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return in_processes(_two_processes, 2, tmp_path_factory.mktemp("processes"))


def test_values_are_exchanged_in_the_order_of_the_ranks(two):
    assert [found["main"] for found in two] == [True, False]
    for found in two:
        assert found["everyone"] == [1, 2] and found["from_main"] == 5
        assert found["mean"] == [1.5, 3.0] and found["least"] == 6


def test_an_error_of_one_process_is_everyones(two):
    assert [found["UsageError"] for found in two] == [("UsageError", "process 1: no such thing", True)] * 2
    assert [found["TemporaryError"] for found in two] == [("TemporaryError", "process 1: away", True)] * 2
    for name, reason in (("OSError", "No space left"), ("FileNotFoundError", "gone")):
        for found in two:
            kind, line, shared = found[name]
            assert kind == SystemFault.__name__ and shared
            assert line.startswith("process 1: ") and reason in line


def _stopped_before_training(rank, world):
    processes = Processes(rank, world, rank, dist.group.WORLD, dist.new_group(backend="gloo"), 60)
    with signals.immediate_stops():
        signals.stop_together(True)
        processes.everyone(rank)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            processes.from_main(rank)
        except RunStopped as stopped:
            return everywhere(stopped)
    return None


def test_a_signal_to_one_process_before_training_stops_all_at_their_next_exchange(tmp_path):
    assert in_processes(_stopped_before_training, 2, tmp_path) == [True, True]


def test_alone_nothing_is_asked():
    alone = Processes()
    assert alone.main and alone.everyone(3) == [3] and alone.main_first(lambda: 4) == 4
    with pytest.raises(UsageError, match="mine") as caught, alone.together():
        raise UsageError("mine")
    assert not everywhere(caught.value)


@pytest.mark.parametrize(
    ("world", "arguments", "expected"),
    [
        (2, ("single", "cpu", 64), "torchrun started 2"),
        (3, ("auto", "cpu", 64), "make it a multiple of 3"),
        (2, ("ddp", "cuda:0", 64), "--device cuda"),
        (99, ("ddp", "cuda", 99), "99 processes on a machine with"),
        (None, ("ddp", "cpu", 64), "needs torchrun"),
    ],
)
def test_what_does_not_fit_is_said_before_anyone_waits(monkeypatch, world, arguments, expected):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert speaks(UsageError())
    if world is not None:
        for name, value in (
            ("RANK", 1),
            ("WORLD_SIZE", world),
            ("LOCAL_RANK", 1),
            ("MASTER_ADDR", "x"),
            ("MASTER_PORT", 1),
        ):
            monkeypatch.setenv(name, str(value))
        assert not speaks(UsageError())  # process 0 says it
    with pytest.raises(UsageError, match=expected) as caught:
        join(*arguments, timeout=5)
    assert "\n" not in str(caught.value)
