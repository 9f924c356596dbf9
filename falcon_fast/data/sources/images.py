"""What a data set consists of: numbered images, splits with or without labels, and the source that holds both splits.

A source knows nothing about augmentation or batches. It returns images by their number, as upright PIL RGB images (the EXIF
orientation is applied), and labels if there are any. Labels are for the probes and the evaluation; the training objective never
sees them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from falcon_fast.data.sources.decoding import MAX_PIXELS, decode
from falcon_fast.data.sources.disk import MissingFile, check_disk, file_bytes, shown

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

__all__ = ["Chosen", "ImageArray", "ImageFiles", "Images", "Source", "Split", "fingerprint", "held_out", "shown"]


class Images(Protocol):
    """Numbered images. `image(i)` is an upright PIL RGB image; `name(i)` identifies it in messages.

    `image` raises BadImage if an image cannot be used, and TemporaryError if the disk cannot be read or memory ran out.
    """

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

    Attributes:
        paths: the files.
        sizes: (width, height) of the upright images, as a scan of the headers found them; None without a scan.
        stamps: int64 (n, 2), the bytes of each file and its time of change in nanoseconds at that scan (changes.py).
        max_pixels: largest width times height of an image (`data.max_pixels`).
    """

    paths: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...] | None = None
    stamps: np.ndarray | None = field(default=None, compare=False, repr=False)
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.paths)

    def data(self, index: int) -> bytes:
        """Return the bytes of a file. Raises the errors of `disk.file_bytes` and `disk.check_disk`."""
        try:
            return file_bytes(self.paths[index])
        except MissingFile:
            check_disk(self.paths[index], self.paths)
            raise

    def image(self, index: int) -> Image:
        return decode(self.data(index), self.max_pixels, self.paths[index])

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
        known_bad: numbers of training images that are known not to decode, and the reasons. Files whose header cannot be read
            have the last numbers, and the size (0, 0): they may be repaired while a run is stopped.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    notes: tuple[str, ...] = ()
    known_bad: tuple[tuple[int, str], ...] = ()

    def normalization(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `mean` and `std` as float32 (3,) on `device`."""
        import torch

        return torch.tensor(self.mean, device=device), torch.tensor(self.std, device=device)


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
