"""The manifest of a folder, kept outside of it: sizes and orientations of its files, and which of them cannot be decoded.

`falcon-fast data verify` writes it. Training then uses it in place of the headers and does not open files whose size and time of
change are the same; images that cannot be decoded are in quarantine from the first step. A file that has changed is examined
again, and so is one that was too large. Only what a decoder said is written, never an error of the disk. There is one CSV file
per folder, in `$XDG_CACHE_HOME/falcon_fast/manifests` (`~/.cache/...`).
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from falcon_fast.data.sources.decoding import MAX_PIXELS, TOO_LARGE, Header, header, read_image
from falcon_fast.data.sources.disk import NO_SUCH_FILE, BadImage, check_disk
from falcon_fast.errors import UsageError
from falcon_fast.files import Appended, writing, written_whole
from falcon_fast.reading import csv_rows

LARGEST_MANIFEST = 4 * 2**30  # bytes; ImageNet-21k's 14 million files take 1.3 GB
COLUMNS = ("file", "bytes", "changed", "width", "height", "orientation", "depth", "decoded", "reason")


class Entry(NamedTuple):
    """What is known of one file. `width` and `height` are of the upright image, 0 if the header cannot be read."""

    bytes: int
    changed: int  # nanoseconds since 1970
    width: int
    height: int
    orientation: int  # EXIF orientation, 1 to 8
    depth: str  # what is special about the file (value_ranges.SCALING), or ""
    decoded: bool  # whether the whole file was decoded, not only its header
    reason: str  # why it cannot be decoded; empty if it can be, or if that was never tried


def manifest_path(root: Path) -> Path:
    """Return where the manifest of a folder is kept. Raises UsageError if this user has no home directory, and names no other."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # no HOME, and no entry in the list of users, as in some containers
        raise UsageError("this user has no home directory: set XDG_CACHE_HOME to a folder for the cache") from None
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return cache / "falcon_fast" / "manifests" / f"{name}.csv"


def read_manifest(root: Path) -> dict[str, Entry]:
    """Return the manifest of a folder, by relative path, without damaged rows; empty if there is no manifest."""
    entries = {}
    try:
        for row in csv_rows(manifest_path(root), LARGEST_MANIFEST, any_bytes=True):
            try:
                name, size, changed, width, height, orientation, depth, decoded, reason = row
                numbers = (int(size), int(changed), int(width), int(height), int(orientation))
            except ValueError:  # the header row, or the last row of a verification that was killed
                continue
            if min(numbers) >= 0 and max(numbers) < 2**63 and 1 <= numbers[4] <= 8:
                entries[name] = Entry(*numbers, depth, decoded == "1", reason)
    except (OSError, ValueError):  # a UsageError (no home directory) is a ValueError
        return {}
    return entries


def write_manifest(root: Path, entries: Mapping[str, Entry]) -> Path:
    """Write the manifest in one atomic step and return its path. Raises WriteError if the cache cannot be written."""
    path = manifest_path(root)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with (
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(_row(name, entries[name]) for name in sorted(entries))
    return path


def _row(name: str, entry: Entry) -> tuple[object, ...]:
    return (name, *entry[:6], int(entry.decoded), entry.reason)


def examine(path: Path, whole: bool, max_pixels: int = MAX_PIXELS) -> Entry:
    """Examine a file: decode it if `whole`, else read its header. Raises TemporaryError if the disk cannot be read."""
    size = changed = 0
    with contextlib.suppress(OSError):  # `header` says why
        status = path.stat()
        size, changed = status.st_size, status.st_mtime_ns
    found, reason = Header(0, 0, 1, ""), ""
    try:
        found = header(path, max_pixels)
        if whole:
            read_image(path, max_pixels)
    except BadImage as error:
        reason = str(error)
    return Entry(size, changed, *found, whole, reason)


def _holds(entry: Entry, path: Path, max_pixels: int) -> bool:
    """Check whether an entry still tells the truth: the file has not changed, nor what is said about its number of pixels."""
    try:
        status = path.stat()
    except OSError:
        return False
    unchanged = (status.st_size, status.st_mtime_ns) == (entry.bytes, entry.changed)
    return unchanged and TOO_LARGE not in entry.reason and entry.width * entry.height <= max_pixels


def scan(
    root: Path, places: Sequence[Path], paths: Sequence[Path], max_pixels: int = MAX_PIXELS
) -> tuple[list[Entry], int]:
    """Return what is known of the files in these places of a folder, and how many entries of the manifest were out of date.

    An entry of the manifest is used if the file has not changed, otherwise the file's header is read. If entries were out of
    date, the manifest is written again.

    max_pixels: largest width times height of an image.

    Raises:
        TemporaryError: the disk cannot be read.
    """
    known = read_manifest(root)
    names = [str(path.relative_to(root)) for path in paths]

    def look(index: int) -> Entry:
        entry = known.get(names[index])
        path = paths[index]
        return entry if entry and _holds(entry, path, max_pixels) else examine(path, False, max_pixels)

    with ThreadPoolExecutor() as pool:
        entries = list(pool.map(look, range(len(paths)), chunksize=256))
    if (gone := next((i for i, entry in enumerate(entries) if entry.reason == NO_SUCH_FILE), None)) is not None:
        check_disk(str(paths[gone]), list(map(str, paths)))
    if not known:
        return entries, 0
    found = dict(zip(names, entries, strict=True))
    here = {name for name in known if any((root / name).is_relative_to(place) for place in places)}
    differing = sum(known.get(name) != found.get(name) for name in here | found.keys())
    if differing:
        with contextlib.suppress(OSError, UsageError):  # the cache may be read-only now; the scan is valid all the same
            write_manifest(root, {name: known[name] for name in known.keys() - here} | found)
    return entries, differing


def verify(
    root: Path,
    paths: Sequence[Path],
    bad: Callable[[Path, str], None],
    done: Callable[[], None],
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Decode every file that the manifest does not list as decoded, and complete the manifest. Return how many files are bad.

    Rows are written as they are found, so a verification that was interrupted can be continued.

    Args:
        root: the folder.
        paths: its image files.
        bad: called with each bad file and the reason, also for those found bad earlier.
        done: called after each file.
        max_pixels: largest width times height of an image.

    Raises:
        WriteError: the manifest cannot be written.
        TemporaryError: the disk cannot be read, or memory ran out. What was found before is kept.
    """
    known, entries, names = read_manifest(root), {}, list(map(str, paths))
    path = write_manifest(root, known)

    def look(each: Path) -> tuple[Path, Entry]:
        entry = known.get(str(each.relative_to(root)))
        if entry and entry.decoded and _holds(entry, each, max_pixels):
            return each, entry
        entry = examine(each, True, max_pixels)
        if entry.reason == NO_SUCH_FILE:
            check_disk(str(each), names)
        return each, entry

    with Appended(path) as file, ThreadPoolExecutor() as pool:
        for each, entry in pool.map(look, paths):
            name = str(each.relative_to(root))
            entries[name] = entry
            if known.get(name) != entry:
                file.write(_row(name, entry))
            if entry.reason:
                bad(each, entry.reason)
            done()
    write_manifest(root, entries)
    return sum(bool(entry.reason) for entry in entries.values())
