"""Read small files that may come from a stranger: text, JSON, TOML and CSV, each of a limited size.

Every function raises OSError or ValueError with one line if a file cannot be read; the caller adds which file it is and what to
do. A file that is not a regular one (a FIFO, a device, a directory) is refused before it is opened for reading, because reading
a FIFO waits for ever and reading a device may have effects. A link is followed: snapshots of shared models consist of links.

The limits count bytes of the file. What Python makes of them is larger: at most 25 times for JSON (an empty object takes 72
bytes, and 3 in the file), and 500 times for TOML, whose files are small. CSV is read row by row.
"""

from __future__ import annotations

import csv
import io
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

LONGEST_ROW = 2**17  # characters of a CSV row; a path of 4,096 bytes and its reason take 10,000 at most
# Dots on a line of TOML. Python's reader takes n^2 / 2 pointers for a key of n parts: 4 GB and 9 s for one key of 64 KiB.
MOST_DOTS = 512


def open_regular(path: Path, limit: int) -> BinaryIO:
    """Open a regular file of at most `limit` bytes for reading in binary.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is not a regular file, or it is larger.
    """
    _check(path, path.stat(), limit)
    # Between the two calls the file may have become a FIFO, which would wait here without O_NONBLOCK.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: PTH123, SIM115
    try:
        _check(path, os.fstat(file.fileno()), limit)
    except ValueError:
        file.close()
        raise
    return file


def _check(path: Path, status: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise ValueError(f"{path.name} is {kind}")
    if status.st_size > limit:
        raise ValueError(f"{path.name} has {status.st_size:,} bytes, but at most {limit:,} are read")


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the contents of a regular file of at most `limit` bytes. Raises OSError or ValueError."""
    with open_regular(path, limit) as file:
        # One byte more, because the file may have grown. Python allocates as much as is asked for.
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise ValueError(f"{path.name} has more than {limit:,} bytes")
    return data


def read_text(path: Path, limit: int) -> str:
    """Return the text of a regular UTF-8 file of at most `limit` bytes. Raises OSError or ValueError."""
    data = read_bytes(path, limit)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None


def read_json(path: Path, limit: int) -> Any:
    """Return the contents of a JSON file of at most `limit` bytes. Raises OSError or ValueError.

    A key that appears twice in one object, NaN and infinity are refused: JSON readers disagree about what they mean.
    """
    text = read_text(path, limit)
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {one_line(error)}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:60]!r} appears twice")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")


def read_toml(path: Path, limit: int) -> dict[str, Any]:
    """Return the tables of a TOML file of at most `limit` bytes. Raises OSError or ValueError."""
    text = read_text(path, limit)
    if any(line.count(".") > MOST_DOTS for line in text.split("\n")):
        raise ValueError(f"{path.name} has a line of more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except ValueError as error:  # also an integer of more digits than Python converts
        raise ValueError(f"{path.name} is not valid TOML: {one_line(error)}") from None


def csv_rows(path: Path, limit: int, *, any_bytes: bool = False) -> Iterator[list[str]]:
    """Yield the rows of a UTF-8 CSV file of at most `limit` bytes, without empty ones. Raises OSError or ValueError.

    any_bytes: bytes that are not UTF-8 become surrogates, as in names of files, instead of an error.
    """
    taken = 0

    def lines(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal taken
        while line := text.readline(LONGEST_ROW):
            taken += len(line)
            if taken >= LONGEST_ROW:
                raise ValueError(f"{path.name} has a row of more than {LONGEST_ROW:,} characters")
            yield line

    with open_regular(path, limit) as raw:
        text = io.TextIOWrapper(raw, "utf-8", errors="surrogateescape" if any_bytes else "strict", newline="")
        try:
            for row in csv.reader(lines(text)):
                taken = 0
                if row:
                    yield row
        except UnicodeDecodeError:
            raise ValueError(f"{path.name} is not UTF-8 text") from None
        except csv.Error as error:
            raise ValueError(f"{path.name}: {one_line(error)}") from None


def csv_records(path: Path, limit: int) -> Iterator[dict[str, str]]:
    """Yield the rows after the header that have a value for each of its names, as dictionaries. Raises OSError or ValueError.

    Other rows are left out: the last one is cut short if a disk was full.
    """
    rows = csv_rows(path, limit)
    header = next(rows, [])
    for row in rows:
        if len(row) == len(header):
            yield dict(zip(header, row, strict=True))


def one_line(error: BaseException, last: bool = False) -> str:
    """Return an error's message, or only its last line, as one printable line of at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = " ".join(lines[-1:] if last else lines)[:200]
    return text if text.isprintable() else repr(text)
