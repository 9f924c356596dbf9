"""What of a metrics.csv is kept when its run is resumed, and whether it is still the file that the run wrote.

Each checkpoint records the length and the checksum that metrics.csv had (`fingerprint`). So a file that was cut short or edited
since then is noticed, whatever was changed. Rows after the checkpoint are no damage: the resumed run writes them again.
"""

from __future__ import annotations

import csv
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Kept(NamedTuple):
    """The rows that are kept, in order, and what was wrong with the file; None if nothing was."""

    rows: list[dict[str, str]]
    problem: str | None


def fingerprint(content: bytes, rows: int) -> dict[str, Any]:
    """Return what a checkpoint records of a metrics.csv: its bytes, their CRC-32, and its rows."""
    return {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}", "rows": rows}


def kept_rows(content: bytes, until: int, recorded: object, columns: Sequence[str]) -> Kept:
    """Return the rows up to step `until` of a metrics.csv.

    Args:
        content: the file as it was found; empty if there is none.
        until: the step of the checkpoint that is resumed, at least 1.
        recorded: the `fingerprint` in that checkpoint; None if it holds none.
        columns: the columns of a file without a header.
    """
    if isinstance(recorded, Mapping) and isinstance(length := recorded.get("bytes"), int):
        whole = content[: max(0, length)]
        if fingerprint(whole, 0)["crc32"] == recorded.get("crc32"):
            return Kept(_rows(whole, columns)[0], None)
        rows, _ = _rows(content, columns)
        mended = _up_to(rows, until)
        return Kept(
            mended,
            f"was cut short or edited since step {until} was saved: {len(mended)} of {recorded.get('rows')} rows can be read",
        )
    rows, bad = _rows(content, columns)
    mended = _up_to(rows, until)
    bad += sum(int(row["step"]) <= until for row in rows) - len(mended)
    return Kept(mended, f"has {bad} rows that are incomplete, not numbers, or there twice" if bad else None)


def _rows(content: bytes, columns: Sequence[str]) -> tuple[list[dict[str, str]], int]:
    """Return the rows whose values are numbers, and how many others there are. A missing header is replaced by `columns`."""
    lines = content.decode("utf-8", errors="replace").replace("\0", "\ufffd").splitlines()
    header = _values(lines[0]) if lines else []
    has_header = "step" in header
    names = header if has_header else list(columns)
    good: list[dict[str, str]] = []
    bad = 0 if has_header or not lines else 1
    for line in lines[1:] if has_header else lines:
        try:
            values = _values(line)
        except csv.Error:  # a field longer than any of ours
            values = []
        row = dict(zip(names, values, strict=False))
        if len(values) == len(names) and _is_step(row["step"]) and all(map(_is_number, values)):
            good.append(row)
        elif line:
            bad += 1
    return good, bad


def _is_step(text: str) -> bool:
    return len(text) < 16 and text.isascii() and text.isdecimal()


def _values(line: str) -> list[str]:
    """Return the values of a line; none if it is no line of a CSV file (a field of more than 131,072 characters)."""
    try:
        return next(csv.reader(io.StringIO(line)), [])
    except csv.Error:
        return []


def _is_number(text: str) -> bool:
    try:
        return not text or not math.isnan(float(text)) or text == "nan"
    except ValueError:
        return False


def _up_to(rows: list[dict[str, str]], until: int) -> list[dict[str, str]]:
    """Return the rows up to a step, each step once (as it stands first) and in order."""
    once: dict[int, dict[str, str]] = {}
    for row in rows:
        if (step := int(row["step"])) <= until:
            once.setdefault(step, row)
    return [once[step] for step in sorted(once)]


def backup_of(path: Path) -> Path:
    """Return the first of path.bak, path.bak-2, ... that does not exist."""
    backup, number = path.with_name(f"{path.name}.bak"), 2
    while backup.exists():
        backup, number = path.with_name(f"{path.name}.bak-{number}"), number + 1
    return backup
