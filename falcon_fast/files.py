"""Files are written whole or not at all, and a disk that takes no more is one line that says what is missing."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from falcon_fast.errors import WriteError

LONGEST_NAME = 255  # bytes of a name in a directory, for the file systems of Linux
REASONS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room within your quota",
    errno.EROFS: "the file system has become read-only: mount it for writing again",
    errno.EACCES: "make the directory writable again",
    errno.EPERM: "make the directory writable again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EIO: "the disk reports an error: see the log of the system",
    errno.ENOENT: "its directory was removed or renamed, or its disk is no longer mounted: put it back",
    errno.ENOTDIR: "its directory was replaced by a file: put it back",
    errno.ESTALE: "its network file system was mounted anew: check that it is there",
}
# safetensors raises its own SafetensorError, with the text of Rust's error: "... No space left on device (os error 28)".
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def free_bytes(path: Path) -> int | None:
    """Return the bytes that are free in the file system of `path`, which need not exist; None if that cannot be found out."""
    for place in (path, *path.absolute().parents):
        with suppress(OSError):
            found = os.statvfs(place)
            return found.f_bavail * found.f_frsize
    return None


def why_not_written(path: Path, error: BaseException, need: int | None = None) -> str | None:
    """Return one line that says why `path` cannot be written and what to do; None if `error` is of another kind.

    need: the bytes that the file takes, if that is known.
    """
    number = error.errno if isinstance(error, OSError) else None
    if type(error).__name__ == "SafetensorError" and (found := _OS_ERROR.search(str(error))):
        number = int(found[1])
    if number is None and not isinstance(error, OSError):
        return None
    what = os.strerror(number) if number else str(error).strip() or type(error).__name__
    if number in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path)
        if free is not None:
            with suppress(OSError):  # what was written of it is removed
                free += path.stat().st_blocks * 512
        sizes = [] if need is None else [f"it needs {_mebibytes(need)}"]
        sizes += [] if free is None else [f"{_mebibytes(free)} are free"]
        what += f" ({', '.join(sizes)})" if sizes else ""
    remedy = REASONS.get(number or 0)
    return f"{path} cannot be written: {what}" + (f"; {remedy}" if remedy else "")


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**27 else f"{size / 2**10:,.1f} KiB"


@contextmanager
def writing(path: Path, need: int | None = None) -> Iterator[None]:
    """Turn an error of the file system inside the context into a WriteError that names `path`.

    need: the bytes that the file takes, if that is known.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        line = why_not_written(path, error, need)
        if line is None:
            raise
        raise WriteError(line) from None


@contextmanager
def written_whole(path: Path, need: int | None = None, synchronised: bool = True) -> Iterator[Path]:
    """Yield another name in the directory of `path`. What is written there takes the name `path` when the context ends.

    If the context is left by an error, nothing stays, and what had the name `path` before keeps it.

    Args:
        path: the file.
        need: the bytes that it takes, if that is known.
        synchronised: wait until it is on the disk, so that a power failure cannot leave an empty file of that name.

    Raises:
        WriteError: the file cannot be written.
    """
    ending = f".{os.getpid()}.partial"
    partial = path.with_name(f".{path.name}{ending}")
    if len(os.fsencode(partial.name)) > LONGEST_NAME:
        partial = path.with_name(f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}{ending}")
    try:
        with writing(path, need):
            partial.unlink(missing_ok=True)  # in the run directory of a stranger it may be a link to any file
            yield partial
            if synchronised:
                synchronise(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


class Appended:
    """A file that grows by whole rows, each on its way to the disk when `write` returns. A context that closes it.

    Raises:
        WriteError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._file = open(path, "ab", buffering=0, opener=_not_a_link)  # noqa: SIM115

    def write(self, row: Iterable[object]) -> bytes:
        """Append a row of a CSV file, and return what was written.

        Raises:
            WriteError: the row cannot be written, and then no part of it stays; or the file was removed or renamed.
        """
        text = io.StringIO(newline="")
        csv.writer(text).writerow(row)
        data = text.getvalue().encode("utf-8", errors="surrogateescape")
        with writing(self._path, len(data)):
            # Writing to a file that has no name any more succeeds, and its rows are lost.
            if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            before = self._file.seek(0, os.SEEK_END)
            try:
                if self._file.write(data) != len(data):  # there was room for a part of the row
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with suppress(OSError):
                    self._file.truncate(before)
                raise
        return data

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Appended:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _not_a_link(path: str, flags: int) -> int:
    """Open a file, but not through a link: the run directory of a stranger may hold one to any file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def synchronise(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
