"""SIGINT and SIGTERM as requests: the step ends, the state is saved, and all processes stop after the same step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Inside, SIGINT and SIGTERM only ask: the yielded function says whether one came. A second one acts at once."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield lambda: False
        return
    requested = False

    def request(number: int, frame: object) -> None:
        nonlocal requested
        requested = True
        for each, previous in before.items():
            signal.signal(each, previous)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, request)
    try:
        yield lambda: requested
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
