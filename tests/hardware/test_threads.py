"""The number of torch's threads follows what other programs leave free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from falcon_fast.hardware import threads
from falcon_fast.hardware.processors import Usage
from falcon_fast.hardware.threads import AdaptiveThreads, check_threads, decide_threads, following_load
from falcon_fast.kernels import team_members

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch) -> Iterator[None]:
    """Restore torch's number of threads; have eight processors, and no OMP_NUM_THREADS."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    yield
    torch.set_num_threads(before)


class Machine:
    """A made-up machine: a clock, the processors that torch's threads keep busy, and those of other programs."""

    def __init__(self) -> None:
        self.now, self.own, self.others = 0.0, 0.0, 0.0
        self.reports = True

    def measure(self) -> Usage | None:
        return Usage(self.own + self.others, self.own) if self.reports else None

    def window(self, adaptive: AdaptiveThreads, others: float) -> int:
        """Let one window pass, in which other programs keep `others` processors busy, and return the number of threads."""
        self.now += threads.WINDOW
        self.own += threads.WINDOW * torch.get_num_threads()
        self.others += threads.WINDOW * others
        adaptive.check()
        return torch.get_num_threads()


def started(machine: Machine, most: int, said: list[str] | None = None, **options) -> AdaptiveThreads:
    torch.set_num_threads(most)
    say = (lambda _: None) if said is None else said.append
    return AdaptiveThreads(most, say, measure=machine.measure, clock=lambda: machine.now, **options)


def test_threads_leave_busy_programs_their_processors_and_come_back() -> None:
    machine, said = Machine(), []
    adaptive = started(machine, 8, said)
    loads = [0.0, 0.3, 1.0, 1.0, 2.6, 8.0, 0.0, 0.0, 0.0]
    assert [machine.window(adaptive, load) for load in loads] == [8, 8, 7, 7, 5, 1, 1, 8, 8]
    assert said[0] == (
        "other programs keep 1.0 of 8 processors busy: computing with 7 instead of 8 threads (training.threads fixes the number)"
    )
    assert len(said) == 1  # the next lines would have come within half a minute


def test_one_quiet_window_changes_nothing() -> None:
    machine = Machine()
    adaptive = started(machine, 8)
    assert [machine.window(adaptive, load) for load in (2, 0, 2, 0, 1, 1)] == [6, 6, 6, 6, 7, 7]


def test_two_runs_beside_each_other_share_the_processors() -> None:
    """Each sees the other's threads as another program; together they settle on all processors."""
    numbers = [8, 8]
    machines = [Machine(), Machine()]
    runs = [started(machine, 8) for machine in machines]
    for _ in range(6):
        got = [8 * number / max(8, sum(numbers)) for number in numbers]  # a fair scheduler's shares
        for i, (machine, run) in enumerate(zip(machines, runs, strict=True)):
            torch.set_num_threads(numbers[i])
            machine.own += threads.WINDOW * (got[i] - numbers[i])  # window() counts a processor for each thread
            numbers[i] = machine.window(run, got[1 - i])
    assert numbers == [4, 4]


def test_nothing_changes_within_a_window_or_where_the_load_is_not_known() -> None:
    machine = Machine()
    adaptive = started(machine, 8)
    machine.now += threads.WINDOW / 2
    machine.others += 100
    adaptive.check()
    assert torch.get_num_threads() == 8
    machine.reports = False
    assert machine.window(adaptive, 5.0) == 8


def test_compiled_code_changes_rarely_and_to_few_numbers() -> None:
    machine = Machine()
    adaptive = started(machine, 8, choices=[1, 2, 4, 8], patience=3)
    assert [machine.window(adaptive, load) for load in (1, 1, 1, 1)] == [8, 8, 4, 4]
    assert [machine.window(adaptive, 0) for _ in range(7)] == [4, 4, 4, 4, 4, 8, 8]


def test_the_context_follows_the_load_and_restores_the_number() -> None:
    torch.set_num_threads(4)
    with following_load(CPU, 0, False, print) as adaptive:
        assert adaptive is not None
        assert adaptive.most == 4
        torch.set_num_threads(2)
        check_threads()
    assert torch.get_num_threads() == 4
    check_threads()  # outside: nothing


@pytest.mark.parametrize("how", ["setting", "environment", "gpu"])
def test_a_chosen_number_and_a_gpu_leave_the_number_alone(monkeypatch, how) -> None:
    torch.set_num_threads(4)
    if how == "environment":
        monkeypatch.setenv("OMP_NUM_THREADS", "4")
    device = torch.device("cuda") if how == "gpu" else CPU
    with following_load(device, 3 if how == "setting" else 0, False, print) as adaptive:
        assert adaptive is None
        assert torch.get_num_threads() == (3 if how == "setting" else 4)


def test_a_quota_limits_the_number_at_the_start(monkeypatch) -> None:
    torch.set_num_threads(6)
    monkeypatch.setattr(threads, "usable_threads", lambda: 2)
    assert decide_threads(0) == torch.get_num_threads() == 2
    assert decide_threads(5) == torch.get_num_threads() == 5  # as the user says


def test_the_members_of_the_team_are_threads_of_this_process() -> None:
    torch.set_num_threads(3)
    torch.ones(1 << 20).sum()
    members = team_members(3)
    if members is None:
        pytest.skip("needs the C++ kernels")
    assert len(set(members)) == len(members) == 3
    assert set(members) <= {int(task.name) for task in Path("/proc/self/task").iterdir()}
    assert os.getpid() in members  # the main thread
    assert team_members(1) == [os.getpid()]
