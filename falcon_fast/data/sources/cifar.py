"""CIFAR-10 and CIFAR-100: the original binary or Python batches, or folders of their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from falcon_fast.data.sources.images import ImageArray, Source, Split, fingerprint, shown
from falcon_fast.data.sources.layout.explicit import Chosen
from falcon_fast.data.sources.pickled_arrays import read_pickled_arrays
from falcon_fast.data.sources.small_folders import open_small_folders
from falcon_fast.errors import UsageError
from falcon_fast.reading import one_line, read_bytes, read_text

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
LARGEST_BATCH = 256 * 2**20  # bytes; CIFAR-100's training file has 155 MB
LARGEST_NAMES = 2**20  # bytes of the file of class names, which has 2 KB
LONGEST_NAME = 80  # characters of a class name
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class _Cifar:
    """One of the two data sets: the names and the layout of its original files, and its normalisation."""

    name: str
    classes: int
    binary: str  # folder of the binary files
    python: str  # folder of the pickled files
    train: tuple[str, ...]
    test: str
    label_bytes: int  # bytes before the pixels in a binary row; the last of them is the class
    label_key: bytes  # key of the labels in a pickled batch
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


_CIFAR10 = _Cifar(
    name="CIFAR-10",
    classes=10,
    binary="cifar-10-batches-bin",
    python="cifar-10-batches-py",
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    label_bytes=1,
    label_key=b"labels",
    mean=CIFAR10_MEAN,
    std=CIFAR10_STD,
)
_CIFAR100 = _Cifar(
    name="CIFAR-100",
    classes=100,
    binary="cifar-100-binary",
    python="cifar-100-python",
    train=("train",),
    test="test",
    label_bytes=2,  # coarse, fine
    label_key=b"fine_labels",
    mean=CIFAR100_MEAN,
    std=CIFAR100_STD,
)


def _original_batches(kind: _Cifar, root: Path, names: Sequence[str]) -> Split:
    """Read the original distribution's binary (`*.bin`) or Python (pickled) batches."""
    pixels, labels = [], []
    for name in names:
        path = root / name
        try:
            if path.suffix == ".bin":
                rows = np.frombuffer(read_bytes(path, LARGEST_BATCH), np.uint8).reshape(-1, kind.label_bytes + 3072)
                label, image = rows[:, kind.label_bytes - 1], rows[:, kind.label_bytes :]
            else:
                batch = read_pickled_arrays(read_bytes(path, LARGEST_BATCH))
                label, image = _labels(batch[kind.label_key]), batch[b"data"]
                if not isinstance(image, np.ndarray):
                    raise ValueError("no array of images")
            if image.dtype != np.uint8 or image.shape != (len(label), 3072) or label.ndim != 1 or not len(label):
                raise ValueError(f"{image.dtype} images of shape {image.shape} and {label.size} labels")
            if not (np.issubdtype(label.dtype, np.integer) and label.min() >= 0 and label.max() < kind.classes):
                raise ValueError(f"labels beyond 0 to {kind.classes - 1}")
        except MemoryError:
            raise UsageError(f"{shown(path)} does not fit into the memory of this machine: use a larger one") from None
        except Exception as error:  # damaged data may raise anything
            raise UsageError(
                f"{shown(path)} is not a readable {kind.name} batch ({one_line(error)}): unpack the archive again"
            ) from None
        labels.append(label)
        pixels.append(image)
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return Split(ImageArray(np.ascontiguousarray(images)), np.concatenate(labels).astype(np.int64))


def _labels(found: Any) -> np.ndarray:
    """The labels of a batch, a list of whole numbers or an array. (numpy would walk through lists of lists without end.)"""
    if isinstance(found, list):
        if not all(type(label) is int for label in found):
            raise ValueError("labels that are not whole numbers")
        found = np.array(found, np.int64)
    if not isinstance(found, np.ndarray):
        raise ValueError("no list of labels")
    return found


def _original(kind: _Cifar, root: Path) -> tuple[Path, Split, Split] | None:
    """Return the folder of the original files (`root`, or the archive's folder in it) and both splits; None if there are none."""
    if (found := _place(kind, root)) is None:
        return None
    place, suffix = found
    train = _original_batches(kind, place, [f"{name}{suffix}" for name in kind.train])
    return place, train, _original_batches(kind, place, [f"{kind.test}{suffix}"])


def _place(kind: _Cifar, root: Path) -> tuple[Path, str] | None:
    """Return the folder of the original files and their extension; None if there are none."""
    for inner, suffix in ((kind.binary, ".bin"), (kind.python, "")):
        for place in (root, root / inner):
            if (place / f"{kind.train[0]}{suffix}").is_file():
                return place, suffix
    return None


def holds_cifar10(root: Path) -> bool:
    """Check whether the original files of CIFAR-10 are in a folder. They are not opened."""
    return _place(_CIFAR10, root) is not None


def holds_cifar100(root: Path) -> bool:
    """Check whether the original files of CIFAR-100 are in a folder. They are not opened."""
    return _place(_CIFAR100, root) is not None


def _open(kind: _Cifar, root: Path, size: int, classes: Any, files: str, chosen: Chosen | None) -> Source:
    notes: tuple[str, ...] = ()
    if found := _original(kind, root):
        place, train, test = found
        names = classes(place)
    else:
        train, test, names, notes = open_small_folders(root, kind.name, kind.classes, files, chosen)
    parts = [split.images.pixels.tobytes() for split in (train, test)]  # type: ignore[attr-defined]
    parts += [split.labels.tobytes() for split in (train, test) if split.labels is not None]
    return Source(train, test, names, size, kind.mean, kind.std, fingerprint(parts), notes)


def open_cifar10(root: Path, size: int, chosen: Chosen | None = None) -> Source:
    """Open CIFAR-10 in any of its forms, with views of `size` pixels a side.

    chosen: the folders of the splits where the user names them; the original files need none.

    Raises:
        UsageError: `root` holds none of these forms, or a file is damaged.
    """
    return _open(_CIFAR10, root, size, lambda place: CIFAR10_CLASSES, "data_batch_1 ...", chosen)


def open_cifar100(root: Path, size: int, chosen: Chosen | None = None) -> Source:
    """Open CIFAR-100 with its hundred fine classes, in any of its forms, with views of `size` pixels a side.

    chosen: the folders of the splits where the user names them; the original files need none.

    Raises:
        UsageError: `root` holds none of these forms, or a file is damaged.
    """
    return _open(_CIFAR100, root, size, _fine_names, "train and test", chosen)


def _fine_names(place: Path) -> tuple[str, ...]:
    """Return the names of the hundred classes from the files of the data set; if these are missing, the class numbers."""
    try:
        if (listed := place / "fine_label_names.txt").is_file():
            names = read_text(listed, LARGEST_NAMES).split()
        else:
            content = read_pickled_arrays(read_bytes(place / "meta", LARGEST_NAMES))
            names = [name.decode() for name in content[b"fine_label_names"]]
        if len(set(names)) == 100 and all(name.isprintable() and len(name) <= LONGEST_NAME for name in names):
            return tuple(names)
    except Exception:  # damaged data may raise anything; the names are for display only
        pass
    return tuple(map(str, range(100)))
