"""One run at a time trains in a run directory: two would remove each other's half-written checkpoints and mix their rows."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

from falcon_fast.errors import UsageError

NAME = ".lock"
# By a file system that does not lock files, where nobody is kept from anything.
REFUSALS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """A context that holds RUN/.lock from `take` to its end, or to the process's, however that comes.

    A POSIX record lock: NFS has it too, and it is of this process alone (forked workers of a loader, which may outlive it, would
    keep a flock).
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._path = directory, directory / NAME
        self._file: int | None = None

    @property
    def held(self) -> bool:
        return self._file is not None

    def take(self, patience: float = 0.0, say: Callable[[str], None] = lambda line: None) -> None:
        """Wait up to `patience` seconds for the run that has it, with a line to `say`; when it is held already, do nothing.

        Raises:
            UsageError: another run has it, or the directory cannot be written.
        """
        end, told = time.monotonic() + patience, False
        while True:
            try:
                self._file = self._file or self._attempt()
            except OSError as error:
                raise UsageError(f"run directory {self._directory} cannot be written: {error.strerror}") from None
            if self.held:
                return
            if time.monotonic() >= end:
                raise UsageError(
                    f"{self._holder()} trains in {self._directory}: wait for it, or choose another --run-dir"
                )
            if not told:
                say(f"{self._directory} is being trained in: waiting {patience:.0f} s for the end of that")
                told = True
            time.sleep(0.2)

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8") or "another process"
        except OSError:  # it has just gone
            return "another process"

    def _attempt(self) -> int | None:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._in_place(file):
                raise BlockingIOError  # removed by who had it
            os.truncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            if error.errno in REFUSALS:
                return file
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
            self._path.unlink(missing_ok=True)  # while it is held: nobody else's
            os.close(self._file)
            self._file = None
