"""SIGINT, SIGTERM and SIGUSR1 as requests: the step ends, the state is saved, and all processes stop after the same step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# SIGUSR1: what batch systems are asked to send some time before the end.
REQUESTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


@contextmanager
def stop_requests(line: str = "") -> Iterator[Callable[[], bool]]:
    """Inside, the signals only ask: the yielded function says whether one came. After any of them, SIGINT acts at once.

    line: what the first one puts on stderr at once; a step may take long, the first one of a compiled network a minute.

    The others may come again: a batch system signals a process directly and through torchrun, and again when its patience
    ends, while the state is being saved.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        first, requested = not requested, True
        signal.signal(signal.SIGINT, before[signal.SIGINT])
        if line and first:
            with suppress(OSError):  # a terminal that is gone, a stderr that is closed
                os.write(2, f"\n{line}\n".encode())  # not print(), which may be at work just now

    before = {number: signal.getsignal(number) for number in REQUESTS}
    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: requested
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
