"""What is on disk or in memory: digits, CIFAR-10, image folders; each as a training and a test split.

A source says nothing of augmentation or batches. It hands out images by number, as PIL RGB images, upright (EXIF orientation
applied), and labels where there are any; labels serve the probes and the evaluation alone, training never sees them.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from falcon_fast.errors import UsageError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from falcon_fast.config import DataConfig

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FOLDER_SIZE = 224
HELD_OUT = 0.1  # of a folder that has no test split


class Images(Protocol):
    """Numbered images. `image(i)` is upright PIL RGB; `name(i)` says which one it is, for messages."""

    def __len__(self) -> int: ...
    def image(self, index: int) -> Image: ...
    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class ImageArray:
    """Images in memory: uint8 (n, H, W, 3)."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, index: int) -> Image:
        from PIL import Image

        return Image.fromarray(self.pixels[index])

    def name(self, index: int) -> str:
        return f"image {index}"


@dataclass(frozen=True)
class ImageFiles:
    """Images on disk, decoded when asked for."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        return shown(self.paths[index])


@dataclass(frozen=True)
class Split:
    """Images and their labels, int64 (n,), or None where the source has none."""

    images: Images
    labels: np.ndarray | None


@dataclass(frozen=True)
class Source:
    """A data set: two splits, class names (empty without labels), the side of a view, and what normalises it.

    `mean` and `std` are per channel, of pixels in [0, 1]. `notes` are lines that the user should see. `fingerprint` identifies
    the data: a run resumes only on the same. Of arrays it is a hash of pixels and labels; of files, of their names and
    dimensions alone, which takes no decoding and lets a run resume when a damaged file has been mended.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    notes: tuple[str, ...] = ()

    def normalization(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`mean` and `std` as float32 (3,) on `device`."""
        import torch

        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


def open_source(config: DataConfig) -> Source:
    """The source that `config` names, with `data.size` pixels a side if that is set.

    Raises:
        UsageError: the path is missing or has no readable image, or does not go with the source.
    """
    if config.source == "digits":
        if config.path:
            raise UsageError(
                "the digits come with scikit-learn and take no --data; for your own images use --recipe folder"
            )
        return _digits(config.size or 16)
    if not config.path:
        raise UsageError(f"recipe source {config.source!r} needs --data PATH, the place of the images")
    try:
        root = Path(os.path.expanduser(config.path))  # noqa: PTH111  # Path's raises for a user that is not there
        if not root.exists():
            raise UsageError(f"--data {shown(root)}: no such path")
        if not root.is_dir():
            raise UsageError(f"--data {shown(root)}: not a folder (unpack an archive first)")
        return _cifar10(root, config.size or 32) if config.source == "cifar10" else _folder(root, config.size)
    except OSError as error:  # no permission, too long a name
        raise UsageError(f"--data {shown(config.path)}: {error.strerror or error}") from None


def shown(path: str | Path) -> str:
    """A path as a message shows it: as it is, or quoted with escapes where it would break the line or the encoding."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def read_image(path: str) -> Image:
    """Decode one file to upright RGB. Raises OSError or another of Pillow's errors when it cannot."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
            upright = Image.fromarray(np.clip(np.asarray(upright) >> 8, 0, 255).astype(np.uint8))
        if (
            upright.mode == "P" and "transparency" in upright.info
        ):  # from P straight to RGB Pillow warns, image by image
            upright = upright.convert("RGBA")
        return upright.convert("RGB")


def _fingerprint(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def held_out(labels: np.ndarray | None, n: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """A fixed split of n images: sorted indices kept and held out, stratified by label where there are labels.

    round(n fraction) are held out, at least one. Each label gives its share rounded down; what is then missing comes one by
    one from the labels with the largest remainders, from labels with a single image last.
    The permutation is numpy's RandomState(0), whose stream never changes.
    """
    random = np.random.RandomState(0)  # the stream that numpy has frozen
    groups = [np.arange(n)] if labels is None else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    shuffled = [random.permutation(group) for group in groups]
    shares = np.array([round(len(group) * fraction, 9) for group in groups])
    counts = np.floor(shares).astype(np.int64)
    missing = max(1, round(n * fraction)) - counts.sum()
    single = np.array([len(group) == 1 for group in groups])
    counts[np.lexsort((-shares, counts - shares, single))[:missing]] += 1
    chosen = np.sort(np.concatenate([group[:count] for group, count in zip(shuffled, counts, strict=True)]))
    return np.setdiff1d(np.arange(n), chosen), chosen


def _digits(size: int) -> Source:
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) * (255 / 16))[:, None]  # 8 x 8, 17 levels of ink
    large = torch.nn.functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
    pixels = large.round().to(torch.uint8).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
    labels = digits.target.astype(np.int64)
    kept, out = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    mean, std = float(pixels[kept].mean()) / 255, float(pixels[kept].std()) / 255
    return Source(
        train=Split(ImageArray(pixels[kept]), labels[kept]),
        test=Split(ImageArray(pixels[out]), labels[out]),
        classes=tuple("0123456789"),
        size=size,
        mean=(mean,) * 3,
        std=(std,) * 3,
        fingerprint=_fingerprint([digits.images.astype(np.uint8).tobytes()]),
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Reads CIFAR's original batches, dicts of bytes and numpy arrays, and refuses every other global: no code runs."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR batch")


def _cifar10_original(root: Path, names: Sequence[str]) -> Split:
    """The original distribution's binary (`*.bin`) or Python (pickled) batches."""
    pixels, labels = [], []
    for name in names:
        path = root / name
        try:
            if path.suffix == ".bin":
                rows = np.fromfile(path, np.uint8).reshape(-1, 3073)
                label, image = rows[:, 0], rows[:, 1:]
            else:
                with path.open("rb") as file:
                    batch = _ArrayUnpickler(file, encoding="bytes").load()
                label, image = np.asarray(batch[b"labels"]), np.asarray(batch[b"data"])
            if image.dtype != np.uint8 or image.shape != (len(label), 3072) or label.ndim != 1 or not len(label):
                raise ValueError(f"{image.dtype} images of shape {image.shape} and {label.size} labels")
            if not (np.issubdtype(label.dtype, np.integer) and label.min() >= 0 and label.max() <= 9):
                raise ValueError("labels beyond 0 to 9")
        except Exception as error:  # a damaged pickle raises whatever its instructions run into
            raise UsageError(
                f"{shown(path)} is not a readable CIFAR-10 batch ({error}): unpack the archive again"
            ) from None
        labels.append(label)
        pixels.append(image)
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(ImageArray(np.ascontiguousarray(images)), np.concatenate(labels).astype(np.int64))


def _cifar10(root: Path, size: int) -> Source:
    for inner, suffix in (("cifar-10-batches-bin", ".bin"), ("cifar-10-batches-py", "")):
        for place in (root, root / inner):
            if (place / f"data_batch_1{suffix}").is_file():
                train = _cifar10_original(place, [f"data_batch_{i}{suffix}" for i in range(1, 6)])
                test = _cifar10_original(place, [f"test_batch{suffix}"])
                return _cifar10_source(train, test, CIFAR10_CLASSES, size)
    source = _folder(root, size)
    if len(source.classes) != 10:
        raise UsageError(
            f"--data {shown(root)} is not CIFAR-10: it needs data_batch_1 ... (original files), "
            "or train/<class>/ and test/<class>/ folders of ten classes"
        )
    splits = []
    for split in (source.train, source.test):  # 60,000 files of 1 KB: decoded once (5 s), not once an epoch

        def pixels(index: int, images: Images = split.images) -> np.ndarray:
            try:
                return np.asarray(images.image(index))
            except Exception as error:  # Pillow raises whatever its decoders do
                raise UsageError(f"{images.name(index)} cannot be decoded ({error}): mend or remove it") from None

        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(pixels, range(len(split.images))))
        if any(array.shape != (32, 32, 3) for array in arrays):
            raise UsageError(
                f"--data {shown(root)} is not CIFAR-10: its images are 32 x 32; for others use --recipe folder"
            )
        splits.append(Split(ImageArray(np.stack(arrays)), split.labels))
    return _cifar10_source(splits[0], splits[1], source.classes, size, source.notes)


def _cifar10_source(
    train: Split, test: Split, classes: tuple[str, ...], size: int, notes: tuple[str, ...] = ()
) -> Source:
    parts = [split.images.pixels.tobytes() for split in (train, test)]  # type: ignore[attr-defined]
    parts += [split.labels.tobytes() for split in (train, test) if split.labels is not None]
    return Source(train, test, classes, size, CIFAR10_MEAN, CIFAR10_STD, _fingerprint(parts), notes)


def _leads_back(folder: Path) -> bool:
    """Whether this is a link to a folder above it: following it would find the same images again, forty levels deep."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(parent.resolve().is_relative_to(target) for parent in folder.parents)


def _image_paths(root: Path) -> list[Path]:
    found: list[Path] = []
    # A folder that cannot be listed goes in as a path: it is then counted among what cannot be read.
    for folder, folders, files in os.walk(root, followlinks=True, onerror=lambda e: found.append(Path(e.filename))):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not _leads_back(Path(folder, n)))
        found.extend(Path(folder, f) for f in files if Path(f).suffix.lower() in EXTENSIONS and f[0] != ".")
    return sorted(found)


def _sizes(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """(width, height) from each file's header, 40 to 70 microseconds each; None where it is not an image."""
    from PIL import Image

    def size(path: Path) -> tuple[int, int] | None:
        try:
            with Image.open(path) as image:
                return image.size
        except (
            Exception
        ):  # Pillow raises whatever its decoders do: OSError, SyntaxError, struct.error, DecompressionBombError
            return None

    with ThreadPoolExecutor() as pool:
        return list(pool.map(size, paths, chunksize=256))


@dataclass(frozen=True)
class _Scan:
    paths: list[Path]
    classes: list[str]  # of each path: its first folder below the root, or "" for an image that lies in the root itself
    sizes: list[tuple[int, int]]
    unreadable: list[Path]


def _scan(root: Path) -> _Scan:
    paths = _image_paths(root)
    sizes = _sizes(paths)
    readable = [(path, size) for path, size in zip(paths, sizes, strict=True) if size is not None]
    kept = [path for path, _ in readable]
    relative = [path.relative_to(root).parts for path in kept]
    return _Scan(
        paths=kept,
        classes=[parts[0] if len(parts) > 1 else "" for parts in relative],
        sizes=[size for _, size in readable],
        unreadable=[path for path, size in zip(paths, sizes, strict=True) if size is None],
    )


def _folder(root: Path, size: int) -> Source:
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / name for name in ("test", "val", "validation") if (root / name).is_dir()), None)
    if train_root is root:
        test_root = None  # `test` is then a class like any other
    scans = [_scan(train_root)] + ([_scan(test_root)] if test_root else [])
    for scan, place in zip(scans, (train_root, test_root), strict=False):
        if not scan.paths:
            reason = (
                f"none of its {len(scan.unreadable)} image files can be read" if scan.unreadable else "no image in it"
            )
            raise UsageError(f"--data {shown(str(place))}: {reason} (looked for {' '.join(sorted(EXTENSIONS))})")
    if len(scans[0].paths) < 2 and test_root is None:
        raise UsageError(f"--data {shown(root)}: one image is not enough to train on and to hold one out")

    names = sorted(set(scans[0].classes))
    numbers = {name: number for number, name in enumerate(names)}
    labelled = len(names) > 1 and "" not in names
    if labelled and len(scans) == 2 and not set(scans[1].classes) <= set(names):
        unknown = sorted(set(scans[1].classes) - set(names))
        if not unknown[0]:
            raise UsageError(
                f"--data {shown(str(test_root))}: images outside class folders, which {shown(train_root)} has"
            )
        raise UsageError(
            f"--data {shown(str(test_root))}: class {unknown[0]!r} is not among those of {shown(train_root)}"
        )

    def split(scan: _Scan, indices: Sequence[int] | np.ndarray | None = None) -> Split:
        chosen = range(len(scan.paths)) if indices is None else indices
        labels = np.array([numbers[scan.classes[i]] for i in chosen], np.int64) if labelled else None
        return Split(ImageFiles(tuple(str(scan.paths[i]) for i in chosen)), labels)

    notes = []
    bad = [path for scan in scans for path in scan.unreadable]
    if bad:
        count = (
            "1 file is no readable image and is"
            if len(bad) == 1
            else f"{len(bad)} files are no readable images and are"
        )
        notes.append(f"{count} left out, the first: {shown(bad[0])}")
    if test_root is not None:
        train, test = split(scans[0]), split(scans[1])
    else:
        everything = split(scans[0])
        kept, out = held_out(everything.labels, len(scans[0].paths), HELD_OUT)
        train, test = split(scans[0], kept), split(scans[0], out)
        notes.append(f"no test split: a fixed tenth, {len(out)} images, is held out")
    if train_root is not root:
        used = {train_root, test_root}
        others = sorted(p.name for p in root.iterdir() if p.is_dir() and p not in used and not p.name.startswith("."))
        if others:
            notes.append(f"beside train/, left out: {', '.join(shown(name) for name in others)}")
    if not labelled:
        why = "images outside the class folders" if len(names) > 1 else "no class folders"
        notes.append(f"{why}: trained and checked for collapse, but no probe, kNN or clustering figures")
    return Source(
        train=train,
        test=test,
        classes=tuple(names) if labelled else (),
        size=size or min(FOLDER_SIZE, int(np.median([min(each) for each in scans[0].sizes]))),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        fingerprint=_fingerprint(
            os.fsencode(f"{path.relative_to(root)}\0{width}x{height}")
            for scan in scans
            for path, (width, height) in zip(scan.paths, scan.sizes, strict=True)
        ),
        notes=tuple(notes),
    )
