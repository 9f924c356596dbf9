"""The image files of a run as they were when it began, kept in its directory.

A resumed run has the same images with the same numbers, whatever has become of their files in between. A file that is gone or
cannot be decoded any more is treated as one that goes bad during the run. One that was unreadable from the beginning and has been
repaired comes back. Files that are new, or whose images have another size, are other data: the run is not resumed on them.

The list is gzipped text: one line of facts about the source, then a line [split, file, width, height, label] for each image, both
as JSON.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from falcon_fast.data.sources.decoding import MAX_PIXELS
from falcon_fast.data.sources.disk import check_disk, shown
from falcon_fast.data.sources.images import ImageFiles, Source, Split, fingerprint
from falcon_fast.errors import TemporaryError, UsageError
from falcon_fast.files import written_whole
from falcon_fast.reading import one_line, open_regular

NAME = "images.jsonl.gz"
LARGEST = 2**30  # bytes of the text; ImageNet-21k's 14 million files take 840 MB
LONGEST_LINE = 2**26  # bytes, of the facts of a thousand classes and more; a path has at most 4,096


def write_listing(path: Path, source: Source, root: Path) -> None:
    """Write the list of a source's files below `root` in one atomic step, unless it is there already.

    Nothing is written for images in memory. A million files take 2 s and 6 MiB.

    Raises:
        WriteError: it cannot be written.
    """
    if not isinstance(source.train.images, ImageFiles):
        return
    facts = _facts(source, root)
    if path.exists() and next(_lines(path), None) == facts:
        return
    with (
        written_whole(path) as partial,
        partial.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
    ):
        packed.write(json.dumps(facts).encode() + b"\n")
        for name, split in (("train", source.train), ("test", source.test)):
            assert isinstance(split.images, ImageFiles)
            sizes = split.images.sizes or ((0, 0),) * len(split.images)
            labels = [None] * len(sizes) if split.labels is None else split.labels.tolist()
            for file, size, label in zip(_relative(split.images, root), sizes, labels, strict=True):
                packed.write(json.dumps([name, file, *size, label]).encode() + b"\n")


def resumed_source(open_now: Callable[[], Source], path: Path, root: Path) -> Source:
    """Return the source of a resumed run: the files that its list at `path` names, if what is below `root` now allows that.

    Otherwise, or without a list, the source is returned as `open_now` opens it; its fingerprint tells the caller that it differs.

    Raises:
        UsageError: the source cannot be opened, or the list is damaged.
        TemporaryError: none of the listed files is there, so the disk seems to be away.
    """
    if not path.exists():
        return open_now()
    try:
        source = open_now()
    except UsageError as error:
        files = _read(path, root)[1]["train"].images
        assert isinstance(files, ImageFiles)
        if any(map(os.path.exists, files.paths)):
            raise
        raise TemporaryError(
            f"{error}; none of the run's images is there: is the disk still there? Start again when it is back, or name the "
            "folder of the images with --data"
        ) from None
    if not isinstance(source.train.images, ImageFiles) or next(_lines(path), None) == _facts(source, root):
        return source
    return _merged(path, source, root)


def _merged(path: Path, source: Source, root: Path) -> Source:
    """Return the source with the listed files; unchanged if there are new images, or images of another size."""
    facts, splits = _read(path, root, source.train.images.max_pixels)  # type: ignore[attr-defined]
    found: dict[str, tuple[int, int]] = {}
    for split in (source.train, source.test):
        assert isinstance(split.images, ImageFiles) and split.images.sizes is not None
        found |= dict(zip(split.images.paths, split.images.sizes, strict=True))
    listed: dict[str, tuple[int, int]] = {}
    for split in splits.values():
        assert isinstance(split.images, ImageFiles) and split.images.sizes is not None
        listed |= dict(zip(split.images.paths, split.images.sizes, strict=True))
    unreadable = (0, 0)
    for file, size in found.items():
        before = listed.get(file)
        if size != unreadable and (before is None or before not in (size, unreadable)):
            return source
    lost = [file for file, size in listed.items() if size != unreadable and found.get(file, unreadable) == unreadable]
    if lost:
        check_disk(lost[0], list(listed))  # some must be readable
    notes = [note for note in source.notes if "is held out" not in note]
    if lost:
        count = "1 image of this run is" if len(lost) == 1 else f"{len(lost)} images of this run are"
        notes.append(f"{count} gone or cannot be decoded any more, the first: {shown(lost[0])}")
    bad = {source.train.images.paths[index]: reason for index, reason in source.known_bad}  # type: ignore[attr-defined]
    names = splits["train"].images.paths  # type: ignore[attr-defined]
    return dataclasses.replace(
        source,
        train=splits["train"],
        test=splits["test"],
        classes=tuple(facts["classes"]),
        size=facts["size"],
        fingerprint=facts["fingerprint"],
        notes=tuple(notes),
        known_bad=tuple((index, bad[file]) for index, file in enumerate(names) if file in bad),
    )


def _facts(source: Source, root: Path) -> dict[str, Any]:
    names = [name for split in (source.train, source.test) for name in _relative(split.images, root)]  # type: ignore[arg-type]
    return {
        "fingerprint": source.fingerprint,
        "names": fingerprint(map(os.fsencode, names)),
        "classes": list(source.classes),
        "size": source.size,
    }


def _relative(images: ImageFiles, root: Path) -> Iterator[str]:
    """Yield the paths below `root`; those of a split elsewhere (`data.train`, `data.test`) as they are."""
    start = f"{root}{os.sep}"
    return (file[len(start) :] if file.startswith(start) else file for file in images.paths)


def _lines(path: Path) -> Iterator[Any]:
    """Yield the lines of a list. Raises UsageError if it is damaged."""
    try:
        with open_regular(path, LARGEST) as packed, gzip.GzipFile(fileobj=packed) as file:
            taken = 0
            while line := file.readline(LONGEST_LINE):
                if (taken := taken + len(line)) > LARGEST:
                    raise ValueError(f"it unpacks to more than {LARGEST:,} bytes")
                yield json.loads(line)
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: object) -> UsageError:
    reason = one_line(error) if isinstance(error, BaseException) else error
    return UsageError(
        f"{shown(path)} is damaged ({reason}): delete it to resume with the images that are there now, if they are still the same"
    )


def _read(path: Path, root: Path, max_pixels: int = MAX_PIXELS) -> tuple[dict[str, Any], dict[str, Split]]:
    """Return the facts and both splits of a list."""
    lines = _lines(path)
    rows: dict[str, list[tuple[str, tuple[int, int], int | None]]] = {"train": [], "test": []}
    try:
        facts = next(lines)
        for name, file, width, height, label in lines:
            if ".." in Path(file).parts or not all(type(n) is int for n in (width, height)):
                raise ValueError(f"a row names {shown(file)}")
            rows[name].append((str(root / file), (width, height), label))
        assert all(type(facts[key]) is kind for key, kind in (("fingerprint", str), ("classes", list), ("size", int)))
        splits = {
            name: Split(
                ImageFiles(tuple(row[0] for row in each), tuple(row[1] for row in each), None, max_pixels),
                np.array([row[2] for row in each], np.int64) if facts["classes"] else None,
            )
            for name, each in rows.items()
        }
    except (StopIteration, AssertionError, KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UsageError):
            raise
        raise _damaged(path, error or type(error).__name__) from None
    return facts, splits
