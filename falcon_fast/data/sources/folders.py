"""Image folders: with or without class folders, with or without separate training and test splits."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from falcon_fast.data.sources import manifest, value_ranges
from falcon_fast.data.sources.decoding import MAX_PIXELS
from falcon_fast.data.sources.images import ImageFiles, Source, Split, fingerprint, held_out, shown
from falcon_fast.data.sources.layout import archives
from falcon_fast.data.sources.layout.explicit import Chosen, layout_of
from falcon_fast.data.sources.layout.matching import match_classes
from falcon_fast.data.sources.layout.splits import Layout
from falcon_fast.data.sources.layout.tree import EXTENSIONS as EXTENSIONS
from falcon_fast.data.sources.layout.tree import Folder, extension_of, name_of, walk
from falcon_fast.data.sources.manifest import Entry
from falcon_fast.errors import UsageError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOLDER_SIZE = 224
HELD_OUT = 0.1  # fraction held out from a folder without a test split
_WORDNET = re.compile(r"n\d{8}")  # name of a class folder of ImageNet
_NAMED = 5  # names of a list that a note shows


def image_paths(root: Path | Folder) -> list[Path]:
    """Return the image files of a folder, selected by their extensions and sorted.

    Links are followed; hidden files and folders are not. Folders that cannot be listed are among the paths, so that whatever
    reads the images finds and names them.

    Raises:
        OSError: `root` itself cannot be listed.
    """
    top = root if isinstance(root, Folder) else walk(root)
    problems = [Path(path) for folder in top.all() for path, _ in folder.problems]
    paths = [Path(path) for path in top.image_paths()]
    return sorted(paths + problems) if problems else paths


@dataclass(frozen=True)
class _Scan:
    """The files of one split, as the header scan or the manifest describes them."""

    paths: list[str]
    classes: list[str]  # of each path; "" for an image outside of the class folders
    sizes: list[tuple[int, int]]
    stamps: list[tuple[int, int]]  # (bytes, time of change) of each file
    depths: list[str]  # what is special about each of them (value_ranges.SCALING), or ""
    reasons: list[str]  # why each of them cannot be decoded, where the manifest says so; else empty
    unreadable: list[tuple[str, str]]  # files whose header cannot be read, and why


@dataclass(frozen=True)
class _Place:
    """A split before its files are looked at."""

    folder: Folder
    paths: list[str]
    classes: list[str]
    unlisted: int = 0  # images that the list of labels does not name


def _place(folder: Folder, layout: Layout, only: frozenset[str] | None) -> _Place:
    """Return the image files of a split and their classes: by the first folder below the split's, or by a list of labels."""
    paths, start = list(folder.image_paths()), len(folder.prefix)
    listed = layout.listed if folder is layout.test else None
    if listed is None:
        parts = [path[start:].split(os.sep, 1) for path in paths]
        classes = [first[0] if len(first) > 1 else "" for first in parts]
    else:
        classes = [listed.classes.get(name_of(path), "") for path in paths]
    unlisted = classes.count("") if listed else 0
    kept = range(len(paths))
    if only:
        kept = [i for i in kept if classes[i] in only]  # type: ignore[assignment]
    elif unlisted:
        kept = [i for i in kept if classes[i]]  # type: ignore[assignment]
    return _Place(folder, [paths[i] for i in kept], [classes[i] for i in kept], unlisted)


def _scan(
    root: Path, places: Sequence[_Place], only: frozenset[str] | None, max_pixels: int
) -> tuple[list[_Scan], int]:
    """Return a scan of each place, and how many entries of the manifest were out of date."""
    entries: dict[str, Entry] = {}
    differing = 0
    inside = [each for each in places if Path(each.folder.path).is_relative_to(root)]
    groups = [(root, inside)] + [(Path(each.folder.path), [each]) for each in places if each not in inside]
    for base, group in groups:
        paths = [path for each in group for path in each.paths]
        folders = [Path(each.folder.path) for each in group]
        if only:  # the manifest may describe classes that are not used
            folders = [folder / name for folder in folders for name in sorted(only)]
        found, changed = manifest.scan(base, folders, [Path(path) for path in paths], max_pixels)
        entries |= zip(paths, found, strict=True)
        differing += changed
    scans = []
    for each in places:
        readable = [(path, name, entries[path]) for path, name in zip(each.paths, each.classes, strict=True)]
        unreadable = [(path, entry.reason) for path, _, entry in readable if not entry.width]
        readable = [one for one in readable if one[2].width]
        scans.append(
            _Scan(
                paths=[path for path, _, _ in readable],
                classes=[name for _, name, _ in readable],
                sizes=[(entry.width, entry.height) for _, _, entry in readable],
                stamps=[(entry.bytes, entry.changed) for _, _, entry in readable],
                depths=[entry.depth for _, _, entry in readable],
                reasons=[entry.reason for _, _, entry in readable],
                unreadable=sorted(unreadable + [one for folder in each.folder.all() for one in folder.problems]),
            )
        )
    return scans, differing


def open_imagenet100(root: Path, size: int, chosen: Chosen | None = None, max_pixels: int = MAX_PIXELS) -> Source:
    """Open ImageNet-100, the hundred classes of Contrastive Multiview Coding (Tian et al. 2020).

    The folder may hold all thousand classes of ImageNet.

    Raises:
        UsageError: class folders are missing.
    """
    return open_folder(root, size, imagenet100_classes(), chosen, max_pixels=max_pixels)


def holds_imagenet100(root: Path) -> bool:
    """Check whether the hundred classes of ImageNet-100 are all among the folders of the training split."""
    layout = layout_of(Path(os.path.abspath(root)), Chosen(), lambda path: True)
    return imagenet100_classes() <= {folder.name for folder in layout.train.folders}


def imagenet100_classes() -> frozenset[str]:
    """Return the names of the hundred classes."""
    return frozenset(
        (resources.files("falcon_fast.data.sources") / "imagenet100.txt").read_text(encoding="utf-8").split()
    )


def open_folder(
    root: Path,
    size: int,
    only: frozenset[str] | None = None,
    chosen: Chosen | None = None,
    evaluation: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Source:
    """Open any folder of images.

    Its training and test splits are found by the rules of `layout/splits.py`. Without a test split, a fixed tenth of the images
    is held out.

    Args:
        root: the folder.
        size: side of a view in pixels; 0 for the median short side of the images, at most 224.
        only: use just these classes, all of which must be there. None for all classes.
        chosen: the folders of the splits where the user names them.
        evaluation: the images are only evaluated: without labels and without a test split, all of them are the test split.
        max_pixels: largest width times height of an image.

    Raises:
        UsageError: there are no readable images, the classes of the splits do not match, or it is not clear what a folder is.
        TemporaryError: the disk cannot be read.
    """
    root = Path(os.path.abspath(root))

    def wanted(path: str) -> bool:
        return not only or name_of(path) in only or not _WORDNET.fullmatch(name_of(path))

    layout = layout_of(root, chosen or Chosen(), wanted)
    folders = [layout.train] + ([layout.test] if layout.test is not None else [])
    for folder in folders:
        if not folder.count:
            looked = f"looked for {' '.join(sorted(EXTENSIONS))}"
            raise UsageError(f"--data {shown(folder.path)}: no image in it{archives.but(folder) or f' ({looked})'}")
    for folder in folders if only else ():
        here = {each.name for each in folder.folders}
        if folder is layout.test and layout.listed is not None:
            here = set(layout.listed.classes.values())
        if missing := sorted((only or frozenset()) - here):
            raise UsageError(
                f"--data {shown(folder.path)}: no class folder {missing[0]}, one of {len(missing)} of ImageNet-100 that are "
                "missing"
            )
    places = [_place(folder, layout, only) for folder in folders]
    scans, differing = _scan(root, places, only, max_pixels)
    for scan, folder in zip(scans, folders, strict=True):
        if not scan.paths:
            raise UsageError(
                f"--data {shown(folder.path)}: none of its {len(scan.unreadable)} image files can be read"
                f"{archives.but(folder)}"
            )
    if len(scans[0].paths) < 2 and layout.test is None:
        raise UsageError(f"--data {shown(root)}: one image is not enough, as one is held out for testing: add images")

    names = sorted(set(scans[0].classes))
    labelled = len(names) > 1 and "" not in names
    notes = []
    if labelled and layout.test is not None:
        numbers, lines = match_classes(names, scans[1].classes, layout.train, layout.test)
        notes += lines
    else:
        numbers = {name: number for number, name in enumerate(names)}

    def split(scan: _Scan, indices: Sequence[int] | np.ndarray | None = None) -> Split:
        chosen = range(len(scan.paths)) if indices is None else indices
        labels = np.array([numbers[scan.classes[i]] for i in chosen], np.int64) if labelled else None
        stamps = np.array([scan.stamps[i] for i in chosen], np.int64).reshape(-1, 2)
        files = ImageFiles(
            tuple(scan.paths[i] for i in chosen), tuple(scan.sizes[i] for i in chosen), stamps, max_pixels
        )
        return Split(files, labels)

    train, kept = split(scans[0]), np.arange(len(scans[0].paths))
    if layout.test is not None:
        test = split(scans[1])
    elif evaluation and not labelled:
        test = train
    else:
        kept, out = held_out(train.labels, len(kept), HELD_OUT)
        train, test = split(scans[0], kept), split(scans[0], out)
    first = _line(root, layout, train, test, scans, names if labelled else [])
    notes = [first, *layout.notes, *notes, *_notes(root, places, scans, differing, labelled)]
    if not labelled:
        why = "images outside the class folders" if len(names) > 1 else "no class folders"
        notes.append(f"{why}: training and the collapse checks work, but there are no probe, kNN or clustering figures")
    unreadable = scans[0].unreadable
    return Source(
        train=_with_unreadable(train, layout.train, unreadable, numbers) if unreadable else train,
        test=test,
        classes=tuple(names) if labelled else (),
        size=size or min(FOLDER_SIZE, int(np.median([min(each) for each in scans[0].sizes]))),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        fingerprint=fingerprint(
            os.fsencode(f"{_below(root, path, place)}\0{width}x{height}")
            for scan, place in zip(scans, places, strict=True)
            for path, (width, height) in zip(scan.paths, scan.sizes, strict=True)
        ),
        notes=tuple(notes),
        known_bad=(
            *((i, scans[0].reasons[k]) for i, k in enumerate(kept.tolist()) if scans[0].reasons[k]),
            *((len(kept) + i, reason) for i, (_, reason) in enumerate(unreadable)),
        ),
    )


def _with_unreadable(train: Split, folder: Folder, unreadable: list[tuple[str, str]], numbers: dict[str, int]) -> Split:
    """Return the training split with the unreadable files behind its images. A file in no known class gets the first one."""
    images = train.images
    assert isinstance(images, ImageFiles) and images.sizes is not None and images.stamps is not None
    paths = tuple(path for path, _ in unreadable)
    files = ImageFiles(
        images.paths + paths,
        images.sizes + ((0, 0),) * len(paths),
        np.concatenate([images.stamps, np.full((len(paths), 2), -1)]),  # a repaired file is no change
        images.max_pixels,
    )
    if train.labels is None:
        return Split(files, None)
    start = len(folder.prefix)
    labels = [numbers.get(path[start:].split(os.sep, 1)[0], 0) for path in paths]
    return Split(files, np.concatenate([train.labels, np.array(labels, np.int64)]))


def _below(root: Path, path: str, place: _Place) -> str:
    """Return the path of a file below `root`; below the folder of its split if that lies elsewhere."""
    start = Folder(str(root)).prefix
    return path[len(start if path.startswith(start) else place.folder.prefix) :]


def _line(root: Path, layout: Layout, train: Split, test: Split, scans: Sequence[_Scan], names: Sequence[str]) -> str:
    """Return the line that says which folder is which split, with the numbers of images and classes, and what is left out."""

    def said(folder: Folder, scan: _Scan) -> str:
        relative = os.path.relpath(folder.path, root)
        where = shown(f"{root.name if relative == '.' else relative}/")
        classes = f" in {len(set(scan.classes))} classes" if names else ""
        return f"{where} ({_counted(len(scan.paths), 'image')}{classes})"

    if layout.test is not None:
        line = f"training split {said(layout.train, scans[0])}, test split {said(layout.test, scans[1])}"
        if layout.listed is not None:
            line += f", its labels from {shown(layout.listed.path)}"
    elif train is test:
        line = f"no test split and no labels: all of {said(layout.train, scans[0])} is evaluated"
    else:
        out = _counted(len(test.images), "image")
        line = f"no test split: a fixed tenth ({out}) is held out of {said(layout.train, scans[0])}"
    if layout.left_out:
        more = len(layout.left_out) - _NAMED
        line += f"; left out: {', '.join(layout.left_out[:_NAMED])}{f', and {more} more' if more > 0 else ''}"
    return line


def _notes(root: Path, places: Sequence[_Place], scans: Sequence[_Scan], differing: int, labelled: bool) -> list[str]:
    """Return lines on what is not used of the folders of the splits, and on a manifest that was out of date."""
    notes = left_out_by_name([place.folder for place in places])
    notes += value_ranges.lines(depth for scan in scans for depth in scan.depths)
    if differing:
        notes.append(f"the manifest of {shown(root)} did not match it ({_counted(differing, 'file')}): rebuilt")
    if bad := [each for scan in scans for each in scan.unreadable]:
        what = (
            "1 file is not a readable image and is"
            if len(bad) == 1
            else f"{len(bad)} files are not readable images and are"
        )
        notes.append(f"{what} left out, the first: {shown(bad[0][0])} ({bad[0][1]})")
    if again := [path for place in places for folder in place.folder.all() for path in folder.again]:
        notes.append(
            f"links that lead where another link leads are not followed: {len(again)}, the first {shown(again[0])}"
        )
    if unlisted := sum(place.unlisted for place in places):
        notes.append(f"{_counted(unlisted, 'image')} of the test split without a label in the list left out")
    if labelled and (empty := [each for each in places[0].folder.folders if not each.count]):
        names = ", ".join(shown(each.name) for each in empty[:_NAMED])
        names += " ..." if len(empty) > _NAMED else ""
        notes.append(f"{_counted(len(empty), 'folder')} without images, so no class: {names}")
    return notes


def left_out_by_name(folders: Sequence[Folder]) -> list[str]:
    """Return lines on the files of folders whose names say that they are no images: how many, and of what kinds."""
    notes = []
    others: Counter[str] = Counter()
    for top in folders:
        for folder in top.all():
            others.update(extension_of(name) for name in folder.others if archives.kind_of(name) is None)
    if others:
        common = sorted(others, key=lambda extension: (-others[extension], not extension, extension))[:_NAMED]
        names = " ".join(shown(extension or "none") for extension in common)
        notes.append(
            f"{_counted(others.total(), 'file')} left out by extension ({names}{' ...' if len(others) > _NAMED else ''})"
        )
    if found := ", ".join(filter(None, (archives.counted(folder) for folder in folders))):
        notes.append(f"not read: {found}; the images beside them are used")
    return notes


def _counted(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"
