"""What a data set is made of: numbered images, splits with labels or without, and the source that holds both.

A source says nothing of augmentation or batches. It hands out images by number, as PIL RGB images, upright (EXIF orientation
applied), and labels where there are any; labels serve the probes and the evaluation alone, training never sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


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
