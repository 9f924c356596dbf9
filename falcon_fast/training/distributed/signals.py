"""SIGINT, SIGTERM and SIGUSR1: what they do to a command, from its first line to its last.

Outside of training a signal ends the command at once (`immediate_stops`): `Stop` is raised in the main thread, everything that is
open is closed, and the command exits with code 130 and one line. A process that does not come to its end within GRACE seconds
(it waits in a library, or for another process) is ended by a thread that watches for signals. With several processes a
signal before training is passed on instead: all of them stop at their next exchange (`Processes.everyone`).

In training a signal is a request (`stop_requests`): the step is completed, the state is saved, and all processes stop after
that step. A second SIGINT then ends the process at once, without that checkpoint.

This module is imported before torch, which takes seconds, so it imports the standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# SIGUSR1: batch systems can be told to send it some time before they end a job.
REQUESTS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
EXIT_CODE = 130
GRACE = 10.0  # seconds; batch systems and torchrun send SIGKILL 30 s after SIGTERM


AGAIN = 0.5  # seconds


class Stop(BaseException):
    """A signal ends this command at once. It is no Exception, because code that handles errors must not swallow it."""


class _Command:
    """What the signals mean to this process, which runs a command.

    Attributes:
        installed: whether the signals end the command.
        requested: whether a signal has come that ends it.
        together: there are other processes, and all of them stop at their next exchange.
        noting: training runs and decides itself when to stop.
        over: whether the command is over, and its process ends.
        line: returns the line that is printed when the command ends by a signal.
    """

    def __init__(self) -> None:
        self.installed = self.requested = self.together = self.noting = self.over = self._said = False
        self.line: Callable[[], str] = lambda: "stopped; nothing was written"

    def end(self, number: int, frame: object) -> None:
        """Handle a signal outside of training. A second SIGINT does not wait for anything to be closed."""
        first, self.requested = not self.requested, True
        if not first and number == signal.SIGINT:
            self.exit()
        if not self.together and not _stopping():
            raise Stop

    def say(self) -> None:
        """Print the line, once."""
        if self._said:
            return
        self._said = True
        try:
            line = self.line()
        except Exception:  # the directory is gone, for example
            line = "stopped"
        with suppress(OSError):  # the terminal is gone, or stderr is closed
            os.write(
                2, f"{line}\n".encode(errors="backslashreplace")
            )  # not print(): the signal may have interrupted one

    def exit(self) -> None:
        """End the process without closing anything. What was being written keeps its temporary name."""
        self.say()
        os._exit(EXIT_CODE)

    def watch(self, reader: int) -> None:
        """End the process GRACE seconds after a signal that ends it, unless training has begun meanwhile. Runs in a thread.

        Until then it sends SIGTERM every AGAIN seconds: Python drops an exception that is raised inside a destructor (of a
        DataLoader, for example), and the command would go on.

        reader: the end of a pipe that yields the numbers of the signals that come, and 0 when there is nothing more to watch.
        """
        end: float | None = None
        while True:
            if end is None:
                numbers = os.read(reader, 64)
                if 0 in numbers:
                    os.close(reader)
                    return
                if any(n in REQUESTS and signal.getsignal(n) == self.end for n in numbers):
                    end = time.monotonic() + GRACE
            elif self.noting or not self.installed:
                end = None
            elif time.monotonic() > end:
                self.exit()
            else:
                time.sleep(AGAIN)
                if not self.together and signal.getsignal(signal.SIGTERM) == self.end:
                    os.kill(os.getpid(), signal.SIGTERM)


def _stopping() -> bool:
    """Whether the main thread closes what is open already, because of a `Stop`."""
    error = sys.exception()
    while error is not None:
        if isinstance(error, Stop):
            return True
        error = error.__context__
    return False


_command = _Command()


@contextmanager
def immediate_stops() -> Iterator[None]:
    """Let SIGINT, SIGTERM and SIGUSR1 raise `Stop` inside the context. Inside another such context nothing changes."""
    global _command
    if _command.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    command = _command = _Command()
    before = {number: signal.getsignal(number) for number in REQUESTS}
    # The signal's number is written to this pipe at once, even while the main thread is inside a library.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    command.installed = True
    threading.Thread(target=command.watch, args=(reader,), name="falcon-fast-signals", daemon=True).start()
    for number in before:
        signal.signal(number, command.end)
    report = sys.unraisablehook

    def report_others(failed: Any) -> None:
        """Say nothing of a `Stop` that Python dropped in a destructor: the signal is sent again."""
        if failed.exc_type is None or not issubclass(failed.exc_type, Stop):
            report(failed)

    sys.unraisablehook = report_others
    try:
        yield
    finally:
        if not command.over:
            sys.unraisablehook = report
            for number, previous in before.items():
                signal.signal(number, previous)
            command.installed = False
            _command = _Command()  # what came to this command is nothing to the caller
            signal.set_wakeup_fd(wakeup)
            os.write(writer, b"\0")
            os.close(writer)


def ignore_signals() -> None:
    """Ignore the signals from here on: the command is over, and what is left is the end of the interpreter."""
    _command.over = True
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


def stop_line(line: Callable[[], str]) -> None:
    """Set what returns the line that is printed when a signal ends the command: what is kept, and how to go on."""
    _command.line = line


def say_stopped() -> None:
    """Print that line to stderr, unless it has been printed already."""
    _command.say()


def stop_together(together: bool) -> None:
    """Say whether there are other processes, which stop together with this one at the next exchange.

    Raises:
        Stop: there are none any more, and a signal came while there were.
    """
    _command.together = together and _command.installed
    if not together and _command.installed and _command.requested:
        raise Stop


def stop_pending() -> bool:
    """Whether this process wants all processes to stop at this exchange."""
    return _command.requested and _command.together and not _command.noting


@contextmanager
def stop_requests(line: str = "") -> Iterator[Callable[[], bool]]:
    """Turn the signals into requests inside the context. The yielded function tells whether a signal has come.

    After the first signal, SIGINT acts at once again. SIGTERM and SIGUSR1 stay requests, because they may come repeatedly: a
    batch system signals a process directly and through torchrun, and again when its patience ends, while the state is being
    saved. A request that came too late for training, in its last step, ends the command when the context ends.

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
    noting, together = _command.noting, _command.together
    _command.noting, _command.together = True, False
    if _command.requested:  # between the last exchange and here
        _command.requested = False
        request(signal.SIGTERM, None)
    completed = False
    try:
        yield lambda: requested
        completed = True
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
        _command.noting, _command.together = noting, together
        if (
            completed and requested and _command.installed
        ):  # too late for this context: it is for what comes after training
            os.kill(os.getpid(), signal.SIGTERM)
