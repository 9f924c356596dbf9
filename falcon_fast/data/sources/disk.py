"""Read regular files, and tell a file that is bad from a disk that cannot be read.

Only a decoder that has read all bytes of a file may call it bad (`BadImage`). An error of the operating system (EIO, ESTALE,
EACCES, too many open files, ...) says nothing about the file. It is raised as TemporaryError, which stops the run with exit code
75, so that a scheduler starts it again.

FIFOs, sockets and devices are never opened: opening a FIFO waits for a writer, and reading a device may have effects.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from falcon_fast.errors import TemporaryError

MAX_BYTES = 2**30  # of one image file; decoded, it takes several times as much
LOOKED_AT = 16  # other files that are tried when one is missing
NO_SUCH_FILE = "no such file"
# Errors that say something about a path that a user gave. The others come from the disk.
ABOUT_THE_PATH = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, None}
)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


class BadImage(ValueError):
    """A file is no image that can be used. The message is the reason, one line without the file's name."""


class MissingFile(BadImage):
    """The file is not there, though its folder is. Whether the disk is there as well, `check_disk` tells."""


def shown(path: str | Path) -> str:
    """Return a path as messages show it: unchanged, or quoted with escapes if it would break the line or the encoding."""
    text = str(path)
    return text if text.isprintable() else repr(text)


class _File(io.FileIO):
    """A file that remembers an error of the disk, because Pillow may turn it into another exception."""

    failure: OSError | None = None

    def readinto(self, buffer: bytearray | memoryview, /) -> int | None:  # type: ignore[override]
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.failure = error
            raise

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            self.failure = error
            raise


def _open(path: str) -> _File:
    _refuse_others(Path(path).stat().st_mode)
    # Between the two calls the file may have become a FIFO, which would wait here without O_NONBLOCK.
    file = _File(path, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC))
    try:
        _refuse_others(os.fstat(file.fileno()).st_mode)
    except BadImage:
        file.close()
        raise
    return file


def _refuse_others(mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "something else")
        raise BadImage(f"{kind}, not a file")


@contextmanager
def regular_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading. Links are followed.

    Raises, also for what happens inside the `with` block:
        MissingFile: it is not there, but its folder is.
        BadImage: it is not a regular file, or a link that leads to itself.
        TemporaryError: the operating system cannot open or read it.
    """
    file: _File | None = None
    try:
        file = _open(str(path))
        yield io.BufferedReader(file)
    except OSError as error:
        if file is None or error.errno is not None:
            raise _explained(path, error) from None
        raise
    finally:
        if file is not None:
            file.close()
            if file.failure is not None:
                raise _explained(path, file.failure) from None


def _explained(path: str | Path, error: OSError) -> Exception:
    if error.errno == errno.ENOENT and Path(path).parent.is_dir():
        return MissingFile(NO_SUCH_FILE)
    if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
        return BadImage(os.strerror(error.errno).lower())
    return unreadable(path, error)


def unreadable(path: str | Path, error: OSError) -> TemporaryError:
    """Return the error that stops a run because the operating system could not read `path`."""
    name = errno.errorcode.get(error.errno or 0, "no error number")
    return TemporaryError(
        f"{shown(path)} cannot be read: {error.strerror or error} ({name}): is the disk still there? Nothing was set aside; "
        "start again when it is back, or remove or repair this file if it alone cannot be read"
    )


def file_bytes(path: str | Path) -> bytes:
    """Return the contents of a regular file. Raises the errors of `regular_file`, and BadImage above MAX_BYTES."""
    with regular_file(path) as file:
        expected = os.fstat(file.fileno()).st_size
        if expected > MAX_BYTES:
            raise BadImage(
                f"its {expected / 2**30:,.1f} GiB are more than the {MAX_BYTES >> 30} GiB that an image file may have"
            )
        data = file.read()
        if len(data) < min(expected, os.fstat(file.fileno()).st_size):
            raise OSError(errno.EIO, f"only {len(data):,} of {expected:,} bytes could be read")
    return data


def check_disk(path: str, others: Sequence[str]) -> None:
    """Check that a missing file is missing alone: at least one of up to LOOKED_AT of the `others` can be read.

    Raises:
        TemporaryError: none can be read, so the disk seems to be away.
    """
    step = max(1, len(others) // LOOKED_AT)
    tried = [other for other in others[::step][: LOOKED_AT + 1] if other != path]
    for other in tried:
        try:
            with regular_file(other) as file:
                file.read(1)
            return
        except BadImage:
            continue
    if tried:
        raise TemporaryError(
            f"{shown(path)} is missing, and so are {len(tried)} others that were looked at: is the disk still there? Nothing was "
            "set aside; start again when it is back"
        )
