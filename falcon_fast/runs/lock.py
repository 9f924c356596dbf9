"""The lock of a run directory: one run at a time trains there.

Two runs would remove each other's half-written checkpoints, and mix their rows in metrics.csv.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from falcon_fast.errors import UsageError
from falcon_fast.reading import read_text

NAME = ".lock"
LARGEST_LOCK = 1024  # bytes: the name of a process and of a machine
# The errors of a file system that cannot lock files. There, no run is kept out.
REFUSALS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """A context that holds RUN/.lock from `take` to the end of the context or of the process, however the process ends.

    It is a POSIX record lock, which NFS supports too, and which belongs to this process alone. (Forked workers of a loader may
    outlive the process, and would keep a flock.)
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / NAME
        self._file: int | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def aim(self, directory: Path) -> None:
        """Make this the lock of another directory. It must not be held."""
        assert not self.held
        self._directory, self._path = directory, directory / NAME

    def take(self, patience: float = 0.0, say: Callable[[str], None] = lambda line: None) -> None:
        """Take the lock. If another run holds it, wait up to `patience` seconds, and tell the user through `say`.

        If this process holds the lock already, nothing happens.

        Raises:
            UsageError: another run still holds it, or the directory cannot be written.
        """
        end, told = time.monotonic() + patience, False
        while True:
            try:
                self._file = self._file or self._attempt()
            except OSError as error:
                raise UsageError(
                    f"run directory {self._directory} cannot be written: {error.strerror}; choose another --run-dir"
                ) from None
            if self.held:
                return
            if time.monotonic() >= end:
                raise UsageError(
                    f"{self._holder()} trains in {self._directory}: wait for it, or choose another --run-dir"
                )
            if not told:
                say(f"another run trains in {self._directory}: waiting up to {patience:.0f} s for its end")
                told = True
            time.sleep(0.2)

    def _holder(self) -> str:
        try:
            holder = read_text(self._path, LARGEST_LOCK)
        except (OSError, ValueError):  # the file has just been removed, or is not one of ours
            holder = ""
        return holder if holder.isprintable() and holder else "another process"

    def _attempt(self) -> int | None:
        # A link would be emptied at its other end: a directory from a stranger may hold one to any file.
        ours = False
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                raise OSError(errno.EINVAL, f"{NAME} is not a regular file")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._in_place(file):
                raise BlockingIOError  # the run that held the lock has just removed the file
            ours = True
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            if error.errno in REFUSALS:
                return file
            if ours:  # the disk is full, for example
                with suppress(OSError):
                    self._path.unlink()
            os.close(file)
            if isinstance(error, BlockingIOError | PermissionError):
                return None
            raise
        return file

    def _in_place(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._path.unlink(missing_ok=True)  # while the lock is held, so that it cannot be another run's file
            os.close(self._file)
            self._file = None
