"""SIGINT, SIGTERM and SIGUSR1 as requests: the step is completed, the state is saved, and all processes stop after that step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# SIGUSR1: batch systems can be told to send it some time before they end a job.
REQUESTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def stop_requests(line: str = "") -> Iterator[Callable[[], bool]]:
    """Turn the signals into requests inside the context. The yielded function tells whether a signal has come.

    After the first signal, SIGINT acts at once again. SIGTERM and SIGUSR1 stay requests, because they may come repeatedly: a
    batch system signals a process directly and through torchrun, and again when its patience ends, while the state is being
    saved.

    line: is printed to stderr as soon as the first signal comes, because a step may take long (the first step of a compiled
        network takes a minute).
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield lambda: False
        return
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        first, requested = not requested, True
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if line and first:
            with suppress(OSError):  # the terminal is gone, or stderr is closed
                os.write(2, f"\n{line}\n".encode())  # not print(), which this signal may have interrupted

    before = {number: signal.getsignal(number) for number in REQUESTS}
    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: requested
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
