"""The number of torch's threads on a CPU: decided at the start, and changed while other programs keep processors busy.

Torch's threads wait for each other at the end of every operation. If another program occupies the processor of one of them, all
of them wait until the system lets that thread run again, which takes milliseconds, some hundred times in a step. On two cores a
run of the digits recipe kept 0.33 of its speed beside one busy program, and 0.14 beside two; now 0.61 and 0.37
(benchmarks/bench_neighbour.py). Shorter waiting (OMP_WAIT_POLICY, GOMP_SPINCOUNT) does not help: the
time is lost by waiting for the processor.

So the number follows what the other programs leave free: the processor time that everything else on these processors used
(/proc/stat, steal included) is measured every few seconds, and is left to the others. Loader processes and threads of this run
count as other programs, because they occupy processors just the same.

A convolution's gradient is a sum over the images that each thread adds up for itself, so its last bits depend on the number of
threads. Two runs are equal bit for bit as long as this number is the same in both, which `training.threads` can fix.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import floor

import torch

from falcon_fast.hardware.processors import Usage, usable_threads, usage
from falcon_fast.kernels import team_members

WINDOW = 2.0  # seconds between two measurements
QUIET = 30.0  # seconds between two lines about a change, at least
PATIENCE_COMPILED = 10  # windows before compiled code, which is compiled again for each number of threads, changes it

Measure = Callable[[], Usage | None]


def own_usage() -> Usage | None:
    """Return the processor time until now, that of torch's threads as `own`; see `processors.usage`."""
    return usage(team_members(torch.get_num_threads()) or [threading.get_native_id()])


class AdaptiveThreads:
    """Gives torch the number of threads that can work without waiting for other programs, between 1 and `most`.

    A smaller number takes effect after one window that asks for it, a larger one after two. `check` must be called by the thread
    that computes, because OpenMP keeps the number for each thread separately.

    Args:
        most: the number of threads on a quiet machine.
        say: is told when the number changes, at most every QUIET seconds.
        choices: the numbers that are used, ascending; the largest at most as large as the wanted number is taken.
        patience: windows in a row that must ask for a change before it is made.
        measure, clock: processor time and seconds; tests replace them.
    """

    def __init__(
        self,
        most: int,
        say: Callable[[str], None],
        choices: Sequence[int] | None = None,
        patience: int = 1,
        measure: Measure = own_usage,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self._say, self._patience = most, say, patience
        self._choices = choices or range(1, most + 1)
        self._measure, self._clock = measure, clock
        self._said = -QUIET
        self._asked: list[int] = []  # what the newest windows asked for
        self._processors = len(os.sched_getaffinity(0))
        self._begin()

    def check(self) -> None:
        """Measure, and change the number if it is time to; cheap otherwise. Call it between two pieces of work."""
        seconds = self._clock() - self._since
        if seconds < WINDOW:
            return
        now = self._measure()
        if self._before is not None and now is not None:
            others = (now.all_busy - self._before.all_busy - (now.own - self._before.own)) / seconds
            self._follow(max(0.0, others))
        self._begin(now)

    def _begin(self, now: Usage | None = None) -> None:
        self._since, self._before = self._clock(), now or self._measure()

    def _follow(self, others: float) -> None:
        """Change the number of threads for other programs that keep `others` processors busy, if enough windows agree."""
        wanted = min(max(1, floor(self._processors - others + 0.5)), self.most)
        wanted = max((n for n in self._choices if n <= wanted), default=self._choices[0])
        now = torch.get_num_threads()
        windows = self._patience * (1 if wanted < now else 2)
        self._asked = [*self._asked[1 - 2 * self._patience :], wanted]
        newest = self._asked[-windows:]
        agreed = max(newest) if wanted < now else min(newest)
        if wanted == now or len(newest) < windows or (agreed < now) != (wanted < now) or agreed == now:
            return
        torch.set_num_threads(agreed)
        self._asked.clear()
        if self._clock() - self._said >= QUIET:
            self._said = self._clock()
            self._say(
                f"other programs keep {others:.1f} of {self._processors} processors busy: "
                f"computing with {agreed} instead of {now} threads (training.threads fixes the number)"
            )


_current: AdaptiveThreads | None = None


def check_threads() -> None:
    """Let the number of torch's threads follow the load, inside `following_load`; nothing happens outside of it."""
    if _current is not None:
        _current.check()


def decide_threads(threads: int) -> int:
    """Set the number of torch's threads, and return it.

    threads: `training.threads`; 0 for OMP_NUM_THREADS, or else the processors that this process may use.
    """
    if not threads:
        threads = torch.get_num_threads()
        if "OMP_NUM_THREADS" not in os.environ:
            threads = min(threads, usable_threads())
    torch.set_num_threads(threads)
    return threads


@contextmanager
def following_load(
    device: torch.device, threads: int, compiled: bool, say: Callable[[str], None]
) -> Iterator[AdaptiveThreads | None]:
    """Decide the number of torch's threads, and let `check_threads` change it inside the context; it is restored afterwards.

    The number is fixed if the user chose it (`threads`, or OMP_NUM_THREADS), and on a GPU, whose host has little to compute.

    Args:
        device: where the run computes.
        threads: `training.threads`; 0 for the number of processors that this process may use.
        compiled: torch.compile makes the step, and again for each other number of threads, up to 8 of them.
        say: is told when the number changes.
    """
    global _current
    before = torch.get_num_threads()
    most = decide_threads(threads)
    adaptive = None
    if not threads and "OMP_NUM_THREADS" not in os.environ and device.type == "cpu" and most > 1:
        halves = [most >> shift for shift in reversed(range(most.bit_length()))] if compiled else None
        adaptive = AdaptiveThreads(most, say, halves, PATIENCE_COMPILED if compiled else 1)
    _current = adaptive
    try:
        yield adaptive
    finally:
        _current = None
        torch.set_num_threads(before)
