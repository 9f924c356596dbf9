"""Image folders: with or without class folders, with or without separate training and test splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from falcon_fast.data.sources import manifest, value_ranges
from falcon_fast.data.sources.decoding import MAX_PIXELS
from falcon_fast.data.sources.disk import ABOUT_THE_PATH, unreadable
from falcon_fast.data.sources.images import ImageFiles, Source, Split, fingerprint, held_out, shown
from falcon_fast.data.sources.manifest import Entry
from falcon_fast.errors import UsageError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
LOOKED_AT = EXTENSIONS | {".gif"}  # no loader reads GIF; it is reported as unreadable rather than ignored
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FOLDER_SIZE = 224
HELD_OUT = 0.1  # fraction held out from a folder without a test split


def _leads_back(folder: Path) -> bool:
    """Check whether this is a link to a folder above it. Following it would find the same images again, forty levels deep."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(parent.resolve().is_relative_to(target) for parent in folder.parents)


def image_paths(root: Path, others: Counter[str] | None = None) -> list[Path]:
    """Return the image files of a folder, selected by their extensions and sorted.

    Links are followed; hidden files and folders are not.

    others: receives the number of files with each other extension.

    Raises TemporaryError if the disk cannot be read.
    """
    found: list[Path] = []

    def closed(error: OSError) -> None:
        """Count a folder that may not be listed among the unreadable files. Raises TemporaryError for an error of the disk."""
        if error.errno not in ABOUT_THE_PATH:
            raise unreadable(error.filename, error)
        found.append(Path(error.filename))

    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not _leads_back(Path(folder, n)))
        for path in (Path(folder, name) for name in files if name[0] != "."):
            if (extension := path.suffix.lower()) in LOOKED_AT:
                found.append(path)
            elif others is not None:
                others[extension] += 1
    return sorted(found)


@dataclass(frozen=True)
class _Scan:
    """The files of one split, as the header scan or the manifest describes them."""

    paths: list[Path]
    classes: list[str]  # for each path, its first folder below the root; "" for an image in the root itself
    sizes: list[tuple[int, int]]
    reasons: list[str]  # why each of them cannot be decoded, where the manifest says so; else empty
    unreadable: list[tuple[Path, str]]  # files whose header cannot be read, and why


def _scan(root: Path, entries: dict[Path, Entry]) -> _Scan:
    """Return the scan of the files below `root`, from all those that were examined."""
    below = [(path, entry) for path, entry in entries.items() if path.is_relative_to(root)]
    readable = [(path, entry) for path, entry in below if entry.width]
    relative = [path.relative_to(root).parts for path, _ in readable]
    return _Scan(
        paths=[path for path, _ in readable],
        classes=[parts[0] if len(parts) > 1 else "" for parts in relative],
        sizes=[(entry.width, entry.height) for _, entry in readable],
        reasons=[entry.reason for _, entry in readable],
        unreadable=[(path, entry.reason) for path, entry in below if not entry.width],
    )


def _look(
    root: Path, places: Sequence[Path], only: frozenset[str] | None, max_pixels: int
) -> tuple[dict[Path, Entry], tuple[str, ...]]:
    """Return what is known of all image files in these places below `root`, and lines for the user.

    The lines say which files were left out, and whether the manifest was out of date.
    """
    if only:
        places = [place / name for place in places for name in sorted(only)]
    others: Counter[str] = Counter()
    paths = [path for place in places for path in image_paths(place, others)]
    entries, differing = manifest.scan(root, places, paths, max_pixels)
    notes = value_ranges.lines(entry.depth for entry in entries)
    if others:
        names = " ".join(shown(extension or "none") for extension, _ in others.most_common(5))
        notes.append(f"{_files(others.total())} left out by extension ({names}{' ...' if len(others) > 5 else ''})")
    if differing:
        notes.append(f"the manifest of {shown(root)} did not match it ({_files(differing)}): rebuilt")
    return dict(zip(paths, entries, strict=True)), tuple(notes)


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def open_imagenet100(root: Path, size: int, max_pixels: int = MAX_PIXELS) -> Source:
    """Open ImageNet-100, the hundred classes of Contrastive Multiview Coding (Tian et al. 2020).

    The folder may hold all thousand classes of ImageNet.

    Raises:
        UsageError: class folders are missing.
    """
    names = (resources.files("falcon_fast.data.sources") / "imagenet100.txt").read_text(encoding="utf-8").split()
    return open_folder(root, size, frozenset(names), max_pixels)


def open_folder(root: Path, size: int, only: frozenset[str] | None = None, max_pixels: int = MAX_PIXELS) -> Source:
    """Open any folder of images.

    Args:
        root: the folder. If it has a folder `train`, that is the training split, and `test`, `val` or `validation` the test
            split; otherwise a fixed tenth of the images is held out as the test split.
        size: side of a view in pixels; 0 for the median short side of the images, at most 224.
        only: use just these classes, all of which must be there. None for all classes.
        max_pixels: largest width times height of an image.

    Raises:
        UsageError: there are no readable images, or the classes of the splits do not match.
        TemporaryError: the disk cannot be read.
    """
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if train_root is root:
        test_root = None  # without `train`, `test` is a class like any other
    places = [train_root] + ([test_root] if test_root else [])
    for folder in places if only else ():
        if missing := sorted(name for name in only or () if not (folder / name).is_dir()):
            raise UsageError(
                f"--data {shown(folder)}: no class folder {missing[0]}, one of {len(missing)} of ImageNet-100 that are missing"
            )
    entries, notes_on_manifest = _look(root, places, only, max_pixels)
    scans = [_scan(place, entries) for place in places]
    for scan, place in zip(scans, (train_root, test_root), strict=False):
        if not scan.paths:
            reason = (
                f"none of its {len(scan.unreadable)} image files can be read" if scan.unreadable else "no image in it"
            )
            raise UsageError(f"--data {shown(str(place))}: {reason} (looked for {' '.join(sorted(EXTENSIONS))})")
    if len(scans[0].paths) < 2 and test_root is None:
        raise UsageError(f"--data {shown(root)}: one image is not enough, as one is held out for testing: add images")

    names = sorted(set(scans[0].classes))
    numbers = {name: number for number, name in enumerate(names)}
    labelled = len(names) > 1 and "" not in names
    if labelled and len(scans) == 2 and not set(scans[1].classes) <= set(names):
        unknown = sorted(set(scans[1].classes) - set(names))
        if not unknown[0]:
            raise UsageError(
                f"--data {shown(str(test_root))}: images outside class folders, while {shown(train_root)} has class folders"
            )
        raise UsageError(
            f"--data {shown(str(test_root))}: class {unknown[0]!r} is not among those of {shown(train_root)}"
        )

    def split(scan: _Scan, indices: Sequence[int] | np.ndarray | None = None) -> Split:
        chosen = range(len(scan.paths)) if indices is None else indices
        labels = np.array([numbers[scan.classes[i]] for i in chosen], np.int64) if labelled else None
        files = ImageFiles(tuple(str(scan.paths[i]) for i in chosen), tuple(scan.sizes[i] for i in chosen), max_pixels)
        return Split(files, labels)

    notes = list(notes_on_manifest)
    bad = [path for scan in scans for path in scan.unreadable]
    if bad:
        count = (
            "1 file is not a readable image and is"
            if len(bad) == 1
            else f"{len(bad)} files are not readable images and are"
        )
        notes.append(f"{count} left out, the first: {shown(bad[0][0])} ({bad[0][1]})")
    if test_root is not None:
        train, test, kept = split(scans[0]), split(scans[1]), np.arange(len(scans[0].paths))
    else:
        everything = split(scans[0])
        kept, out = held_out(everything.labels, len(scans[0].paths), HELD_OUT)
        train, test = split(scans[0], kept), split(scans[0], out)
        notes.append(f"no test split: a fixed tenth ({len(out)} images) is held out")
    if train_root is not root:
        used = {train_root, test_root}
        others = sorted(p.name for p in root.iterdir() if p.is_dir() and p not in used and not p.name.startswith("."))
        if others:
            notes.append(f"not used, because there is a folder train/: {', '.join(shown(name) for name in others)}")
    if not labelled:
        why = "images outside the class folders" if len(names) > 1 else "no class folders"
        notes.append(f"{why}: training and the collapse checks work, but there are no probe, kNN or clustering figures")
    return Source(
        train=_with_unreadable(train, train_root, scans[0].unreadable, numbers if labelled else None),
        test=test,
        classes=tuple(names) if labelled else (),
        size=size or min(FOLDER_SIZE, int(np.median([min(each) for each in scans[0].sizes]))),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        fingerprint=fingerprint(
            os.fsencode(f"{path.relative_to(root)}\0{width}x{height}")
            for scan in scans
            for path, (width, height) in zip(scan.paths, scan.sizes, strict=True)
        ),
        notes=tuple(notes),
        known_bad=(
            *((i, scans[0].reasons[k]) for i, k in enumerate(kept.tolist()) if scans[0].reasons[k]),
            *((len(kept) + i, reason) for i, (_, reason) in enumerate(scans[0].unreadable)),
        ),
    )


def _with_unreadable(
    train: Split, root: Path, unreadable: list[tuple[Path, str]], numbers: dict[str, int] | None
) -> Split:
    """Return the training split with the unreadable files behind its images. A file in no known class gets the first one."""
    assert isinstance(train.images, ImageFiles) and train.images.sizes is not None
    paths = [path for path, _ in unreadable]
    files = ImageFiles(
        train.images.paths + tuple(map(str, paths)),
        train.images.sizes + ((0, 0),) * len(paths),
        train.images.max_pixels,
    )
    if train.labels is None or numbers is None:
        return Split(files, None)
    labels = [numbers.get(path.relative_to(root).parts[0], 0) for path in paths]
    return Split(files, np.concatenate([train.labels, np.array(labels, np.int64)]))
