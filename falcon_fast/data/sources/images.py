"""What a data set consists of: numbered images, splits with or without labels, and the source that holds both splits.

A source knows nothing about augmentation or batches. It returns images by their number, as upright PIL RGB images (the EXIF
orientation is applied), and labels if there are any. Labels are for the probes and the evaluation; the training objective never
sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


# GIF is not among them: DALI cannot read it, and all loaders read the same formats.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
ORIENTATION = 0x0112  # EXIF tag; from orientation 5 on, width and height are exchanged
TIFF_SIZE = (256, 257)


class Images(Protocol):
    """Numbered images. `image(i)` is an upright PIL RGB image; `name(i)` identifies it in messages."""

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
    """Images on disk, decoded when they are asked for.

    `sizes` are (width, height) of the upright images, as a scan of the headers found them; None without a scan. `stamps`, int64
    (n, 2), are the bytes of each file and its time of change in nanoseconds at that scan (changes.py).
    """

    paths: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] | None = None
    stamps: np.ndarray | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        return shown(self.paths[index])


@dataclass(frozen=True)
class Chosen:
    """A selection of other images, by their numbers there."""

    images: Images
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def image(self, index: int) -> Image:
        return self.images.image(int(self.numbers[index]))

    def name(self, index: int) -> str:
        return self.images.name(int(self.numbers[index]))


@dataclass(frozen=True)
class Split:
    """Images and their labels, int64 (n,); the labels are None if the source has none."""

    images: Images
    labels: np.ndarray | None

    def without(self, bad: Collection[int]) -> Split:
        """Return the split without these images; the split itself if `bad` is empty."""
        if not bad:
            return self
        kept = np.setdiff1d(np.arange(len(self.images)), list(bad))
        return Split(Chosen(self.images, kept), None if self.labels is None else self.labels[kept])


@dataclass(frozen=True)
class Source:
    """A data set.

    Attributes:
        train, test: the two splits.
        classes: class names; empty without labels.
        size: side of a view in pixels.
        mean, std: per channel, of pixels in [0, 1]; for normalisation.
        fingerprint: identifies the data; a run resumes only on the same data. For arrays it is a hash of pixels and labels. For
            files it is a hash of their names and dimensions alone, so it needs no decoding, and a run can resume after a damaged
            file was repaired.
        notes: lines that the user should see.
        left_out: files of the training split that are not readable images, and the reasons; they have no number.
        known_bad: numbers of training images that are known not to decode, and the reasons.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    notes: tuple[str, ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    known_bad: tuple[tuple[int, str], ...] = ()

    def normalization(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `mean` and `std` as float32 (3,) on `device`."""
        import torch

        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


def shown(path: str | Path) -> str:
    """Return a path as messages show it: unchanged, or quoted with escapes if it would break the line or the encoding."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def header(path: str | Path) -> tuple[int, int, int]:
    """Return (width, height) of the upright image and its EXIF orientation, 1 to 8, from a file's header, in 70 microseconds.

    Raises the same errors as `read_image`.
    """
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if image.format == "TIFF":  # newer versions of Pillow have applied the orientation already, older ones have not
            width, height = (image.tag_v2[tag] for tag in TIFF_SIZE)  # type: ignore[attr-defined]
        # For a PNG without EXIF, Pillow's getexif would decode all pixels to search for a chunk behind them.
        elif not any(word in str(key).lower() for key in image.info for word in ("exif", "xmp")):
            return width, height, 1
        orientation = image.getexif().get(ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def header_size(path: str | Path) -> tuple[int, int]:
    """Return (width, height) of the upright image, from the file's header."""
    return header(path)[:2]


def read_image(file: str | BinaryIO) -> Image:
    """Decode one file to an upright RGB image.

    Raises OSError or another of Pillow's errors if it cannot be decoded, or if its format is not among FORMATS.
    """
    from PIL import Image, ImageOps

    with Image.open(file, formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
            upright = Image.fromarray(np.clip(np.asarray(upright) >> 8, 0, 255).astype(np.uint8))
        # Converting such an image from P to RGB directly makes Pillow warn for each image.
        if upright.mode == "P" and "transparency" in upright.info:
            upright = upright.convert("RGBA")
        return upright.convert("RGB")


def reason_of(error: BaseException) -> str:
    """Return in one line what was wrong with a file."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:  # Pillow repeats the path, or shows an address in memory
        return "not an image of a known format"
    return text if text.isprintable() else repr(text)


def fingerprint(parts: Iterable[bytes]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 hash of the parts."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def held_out(labels: np.ndarray | None, n: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return a fixed split of n images: sorted indices kept and held out, stratified by label if there are labels.

    round(n fraction) images are held out, at least one. Each label gives its share rounded down; the images still missing come
    one by one from the labels with the largest remainders, and from labels with a single image last. The permutation is from
    numpy's RandomState(0), whose stream never changes.
    """
    random = np.random.RandomState(0)  # numpy guarantees that this stream never changes
    groups = [np.arange(n)] if labels is None else [np.flatnonzero(labels == label) for label in np.unique(labels)]
    shuffled = [random.permutation(group) for group in groups]
    shares = np.array([round(len(group) * fraction, 9) for group in groups])
    counts = np.floor(shares).astype(np.int64)
    missing = max(1, round(n * fraction)) - counts.sum()
    single = np.array([len(group) == 1 for group in groups])
    counts[np.lexsort((-shares, counts - shares, single))[:missing]] += 1
    chosen = np.sort(np.concatenate([group[:count] for group, count in zip(shuffled, counts, strict=True)]))
    return np.setdiff1d(np.arange(n), chosen), chosen
