"""What a data set is made of: numbered images, splits with labels or without, and the source that holds both.

A source says nothing of augmentation or batches. It hands out images by number, as PIL RGB images, upright (EXIF orientation
applied), and labels where there are any; labels serve the probes and the evaluation alone, training never sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


# GIF is not among them: DALI reads none, and all loaders read the same.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height change places
TIFF_SIZE = (256, 257)


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
    """Images on disk, decoded when asked for.

    `sizes`, (width, height) of the upright image, are what a header scan found; None where nobody has scanned.
    """

    paths: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Image:
        return read_image(self.paths[index])

    def name(self, index: int) -> str:
        return shown(self.paths[index])


@dataclass(frozen=True)
class Chosen:
    """Some of other images, by their numbers there."""

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
    """Images and their labels, int64 (n,), or None where the source has none."""

    images: Images
    labels: np.ndarray | None

    def without(self, bad: Collection[int]) -> Split:
        """What is left without these images; the split itself if there are none."""
        if not bad:
            return self
        kept = np.setdiff1d(np.arange(len(self.images)), list(bad))
        return Split(Chosen(self.images, kept), None if self.labels is None else self.labels[kept])


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
    left_out: tuple[tuple[str, str], ...] = ()  # files of the training split that are no readable images, and why
    known_bad: tuple[tuple[int, str], ...] = ()  # its images that are known not to decode, by number, and why

    def normalization(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """`mean` and `std` as float32 (3,) on `device`."""
        import torch

        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


def shown(path: str | Path) -> str:
    """A path as a message shows it: as it is, or quoted with escapes where it would break the line or the encoding."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def header(path: str | Path) -> tuple[int, int, int]:
    """(width, height) of the upright image and its EXIF orientation, 1 to 8, from a file's header, in 70 microseconds.

    Raises as `read_image` does.
    """
    from PIL import Image

    with Image.open(path, formats=FORMATS) as image:
        width, height = image.size
        if image.format == "TIFF":  # newer Pillows have turned the size already, older ones not
            width, height = (image.tag_v2[tag] for tag in TIFF_SIZE)  # type: ignore[attr-defined]
        # Of a PNG without EXIF Pillow's getexif would decode all pixels, in search of a chunk behind them.
        elif not any(word in str(key).lower() for key in image.info for word in ("exif", "xmp")):
            return width, height, 1
        orientation = image.getexif().get(ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        return (height, width, orientation) if orientation >= 5 else (width, height, orientation)


def header_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright image, by `header`."""
    return header(path)[:2]


def read_image(file: str | BinaryIO) -> Image:
    """Decode one file to upright RGB. Raises OSError or another of Pillow's errors when it cannot, or when it is another
    format than FORMATS.
    """
    from PIL import Image, ImageOps

    with Image.open(file, formats=FORMATS) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 bits: Pillow's own conversion clips instead of scaling
            upright = Image.fromarray(np.clip(np.asarray(upright) >> 8, 0, 255).astype(np.uint8))
        if (
            upright.mode == "P" and "transparency" in upright.info
        ):  # from P straight to RGB Pillow warns, image by image
            upright = upright.convert("RGBA")
        return upright.convert("RGB")


def reason_of(error: BaseException) -> str:
    """What was wrong with a file, in one line."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify image file" in text:  # Pillow repeats the path, or an address in memory
        return "not an image of a known format"
    return text if text.isprintable() else repr(text)


def fingerprint(parts: Iterable[bytes]) -> str:
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
