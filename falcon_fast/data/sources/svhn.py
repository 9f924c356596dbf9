"""SVHN, cropped digits: the original `train_32x32.mat` and `test_32x32.mat`, or folders of their images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from falcon_fast.data.sources.images import ImageArray, Source, Split, fingerprint, shown
from falcon_fast.data.sources.layout.explicit import Chosen
from falcon_fast.data.sources.matlab import read_matlab_arrays
from falcon_fast.data.sources.small_folders import open_small_folders
from falcon_fast.errors import UsageError
from falcon_fast.reading import one_line

SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
LARGEST_FILE = 512 * 2**20  # bytes, also unpacked; the training file has 182 MB, and 226 MB unpacked
SVHN_CLASSES = tuple("0123456789")


def _read(path: Path) -> Split:
    """Read one MATLAB file: X uint8 (32, 32, 3, n), y (n, 1), where 10 stands for the digit 0."""
    try:
        content = read_matlab_arrays(path, ("X", "y"), LARGEST_FILE)
        if content["X"].ndim != 4:
            raise ValueError(f"images of shape {content['X'].shape}")
        pixels, labels = np.moveaxis(content["X"], 3, 0), content["y"].reshape(-1)
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 32, 32, 3) or not len(labels):
            raise ValueError(f"{pixels.dtype} images of shape {pixels.shape} and {labels.size} labels")
        if not (np.issubdtype(labels.dtype, np.integer) and labels.min() >= 1 and labels.max() <= 10):
            raise ValueError("labels beyond 1 to 10")
    except MemoryError:
        raise UsageError(f"{shown(path)} does not fit into the memory of this machine: use a larger one") from None
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise UsageError(f"{shown(path)} is not a readable SVHN file ({reason}): download it again") from None
    return Split(ImageArray(np.ascontiguousarray(pixels)), labels.astype(np.int64) % 10)


def holds_svhn(root: Path) -> bool:
    """Check whether an original file of SVHN is in a folder. It is not opened."""
    return any(file.is_file() for file in _files(root))


def _files(root: Path) -> list[Path]:
    return [root / f"{split}_32x32.mat" for split in ("train", "test")]


def open_svhn(root: Path, size: int, chosen: Chosen | None = None) -> Source:
    """Open SVHN in either form, with views of `size` pixels a side. `extra_32x32.mat` is not used.

    chosen: the folders of the splits where the user names them; the original files need none.

    Raises:
        UsageError: `root` holds neither form, or a file is damaged.
    """
    notes: tuple[str, ...] = ()
    if holds_svhn(root):
        train, test = map(_read, _files(root))
        names = SVHN_CLASSES
    else:
        train, test, names, notes = open_small_folders(root, "SVHN", 10, "train_32x32.mat and test_32x32.mat", chosen)
    parts = [split.images.pixels.tobytes() for split in (train, test)]  # type: ignore[attr-defined]
    parts += [split.labels.tobytes() for split in (train, test) if split.labels is not None]
    return Source(train, test, names, size, SVHN_MEAN, SVHN_STD, fingerprint(parts), notes)
