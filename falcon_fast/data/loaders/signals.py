"""The worker processes of a DataLoader: which signals they take, and what happens when the kernel ends one of them."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process

from falcon_fast.errors import TemporaryError

HELD = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# torch says of dead workers "DataLoader worker (pid 123) is killed by signal: Killed. " or "(pid(s) 1, 2) exited unexpectedly".
DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly)")


@contextmanager
def hold_signals() -> Iterator[None]:
    """Hold back SIGINT, SIGTERM and SIGUSR1 while worker processes are forked, so that none of them takes one for the trainer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_the_trainer(worker: int) -> None:
    """Keep a worker process running when the user presses Ctrl-C; for DataLoader's `worker_init_fn`.

    Ctrl-C reaches every process of the terminal, and torchrun signals whole process groups. The trainer decides when to stop, and
    until then it needs batches to finish the current step and save. So each worker leaves the process group and ignores SIGINT.
    The worker ends when the trainer does, even if that is killed.

    worker: the number of the worker, which DataLoader passes; not used.
    """
    os.setpgid(0, 0)
    # A forked worker inherits the trainer's own handlers, and the pipe that tells it of signals.
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)
    end_with_the_parent()


def end_with_the_parent() -> None:
    """Have the kernel kill this process when its parent ends, however that ends. Does nothing outside of Linux.

    A worker that only looks whether its parent is still there, as DataLoader's do every 5 s, lives on until its batch is read.
    """
    parent = parent_process()
    if sys.platform != "linux" or parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent.pid:  # it has ended before that call
        os._exit(1)


@contextmanager
def lost_workers(kept: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn the error that torch raises when a worker process has died into a TemporaryError of one line.

    kept: returns the end of the message, which says what is saved.
    """
    try:
        yield
    except RuntimeError as error:
        found = DEAD.search(str(error))
        if found is None:
            raise
        workers, name = found.groups()
        how = "ended unexpectedly" if name is None else f"was ended by a signal ({name.strip()})"
        if name is None or "Killed" in name:
            why = "most likely by the kernel, because memory ran out: use fewer workers (--set data.workers=N)"
        elif "Bus" in name:
            why = "most likely because /dev/shm is full: give it more room, or use fewer workers (--set data.workers=N)"
        else:
            why = "most likely by a fault in a decoder: `falcon-fast data verify` finds the image"
        end = f"; {kept()}" if kept else ""
        raise TemporaryError(f"the data worker with process number {workers} {how}, {why}{end}") from None
