"""Files that hold images but are not image files: archives, tables and databases. They are named, and never opened."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from falcon_fast.data.sources.images import shown
from falcon_fast.data.sources.layout.tree import Folder


@dataclass(frozen=True)
class Kind:
    """A kind of such files.

    Attributes:
        one, many: what one file, and several files, are called.
        pattern: a regular expression that finds the kind in the lower-case name of a file.
        advice: what to do, given the path of a file and whether there are several in its folder.
    """

    one: str
    many: str
    pattern: str
    advice: Callable[[str, bool], str]


def _quoted(path: str) -> str:
    return shlex.quote(path) if path.isprintable() else shown(path)


def _unpacked(command: str) -> Callable[[str, bool], str]:
    """Return the advice to unpack with a command, for one file or for all files of the same extension in its folder."""

    def advice(path: str, several: bool) -> str:
        if not several:
            return f"unpack it: mkdir IMAGES && {command.format(_quoted(path))}"
        folder, name = os.path.split(path)
        kind = kind_of(name)
        extension = re.search(kind.pattern, name.lower()) if kind else None
        files = f"{_quoted(folder)}/*{name[extension.start() :] if extension else ''}"
        one = command.format('"$f"')
        return f"unpack them: mkdir IMAGES && for f in {files}; do {one}; done"

    return advice


def _said(text: str) -> Callable[[str, bool], str]:
    return lambda path, several: text


_WRITE = _said('write their images as files first (the page "How-to: data" shows how)')


def _kind(one: str, pattern: str, advice: Callable[[str, bool], str], many: str = "") -> Kind:
    return Kind(one, many or f"{one}s", pattern, advice)


KINDS = (
    _kind("tar archive", r"\.(tar(\.(gz|bz2|xz|zst|lz4))?|tgz|tbz2?|txz)$", _unpacked("tar -xf {} -C IMAGES")),
    _kind("ZIP archive", r"\.zip$", _unpacked("python -m zipfile -e {} IMAGES")),
    _kind("7z or RAR archive", r"\.(7z|rar)$", _unpacked("7z x {} -oIMAGES")),
    _kind("Parquet file", r"\.parquet$", _WRITE),
    _kind("Arrow file", r"\.(arrow|feather)$", _WRITE),
    _kind("TFRecord file", r"\.tfrecords?(\.gz)?(-\d+-of-\d+)?$|^[^.]*-\d{5}-of-\d{5}$", _WRITE),
    _kind("LMDB database", r"\.lmdb$|(?<!lock)\.mdb$", _WRITE),
    _kind("HDF5 file", r"\.(h5|hdf5?)$", _WRITE),
    _kind("numpy file", r"\.np[yz]$", _WRITE),
    _kind("MATLAB file", r"\.mat$", _WRITE),
    _kind("RecordIO file", r"\.(rec|beton)$", _WRITE),
    _kind("IDX file", r"-ubyte(\.gz)?$", _WRITE),
    _kind("pickle", r"\.(pkl|pickle|pt|pth)$", _said("they can run code, so write their images as files yourself")),
    _kind("video", r"\.(mp4|avi|mov|mkv|webm|mpe?g)$", _said("write their frames as images, e.g. with ffmpeg")),
    _kind("image of another format", r"\.(hei[cf]|avif|jxl|jp2|j2k|svg|tga|psd|exr|ico|cr[23]|nef|arw|dng|dcm|nii)(\.gz)?$",
          _said("convert them to PNG or JPEG, e.g. with ImageMagick"), many="images of another format"),
    _kind("compressed file", r"\.(gz|bz2|xz|zst)$", _said("decompress them first")),
)  # fmt: skip


# One search per name: a folder may hold a million files that are no images.
_ANY = re.compile("|".join(f"(?P<k{i}>{kind.pattern})" for i, kind in enumerate(KINDS)))


def kind_of(name: str) -> Kind | None:
    """Return the kind of a file, judged by its name; None if it is none of these."""
    match = _ANY.search(name.lower())
    return KINDS[int((match.lastgroup or "k0")[1:])] if match else None


def _found(folder: Folder) -> dict[Kind, list[str]]:
    """Return the paths of such files below a folder, by kind, in the order of KINDS."""
    found: dict[Kind, list[str]] = {kind: [] for kind in KINDS}
    for inside in folder.all():
        for name in inside.others:
            if (kind := kind_of(name)) is not None:
                found[kind].append(f"{inside.prefix}{name}")
    return {kind: paths for kind, paths in found.items() if paths}


def counted(folder: Folder) -> str:
    """Return how many such files of which kind are below a folder, as in "2 tar archives, 1 video"; empty if there are none."""
    return _counts(_found(folder))


def _counts(found: dict[Kind, list[str]]) -> str:
    return ", ".join(f"{len(paths)} {kind.one if len(paths) == 1 else kind.many}" for kind, paths in found.items())


def describe(folder: Folder) -> str:
    """Return one line on such files below a folder: how many there are of which kind, and what to do. Empty if there are none."""
    found = _found(folder)
    if not found:
        return ""
    kind, paths = max(found.items(), key=lambda each: len(each[1]))
    folder_of_first = paths[0].rpartition(os.sep)[0]
    several = sum(path.rpartition(os.sep)[0] == folder_of_first for path in paths) > 1
    first = shown(os.path.relpath(paths[0], folder.path))
    return f"{_counts(found)} (the first: {first}), which are not read: {kind.advice(paths[0], several)}"


def but(folder: Folder) -> str:
    """Return ", but ..." with the line of `describe`; empty if there are no such files. It continues "no image in it"."""
    found = describe(folder)
    return f", but {found}" if found else ""


def describe_file(path: Path) -> str:
    """Return what to do with a single file that was given in place of a folder."""
    kind = kind_of(path.name)
    return f"a {kind.one}, not a folder: {kind.advice(str(path), False)}" if kind else "not a folder"
