"""CIFAR-10: the original binary or Python batches, or folders of its images."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from falcon_fast.data.folders import open_folder
from falcon_fast.data.images import ImageArray, Images, Source, Split, fingerprint, shown
from falcon_fast.errors import UsageError

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


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


def _original_batches(root: Path, names: Sequence[str]) -> Split:
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


def open_cifar10(root: Path, size: int) -> Source:
    for inner, suffix in (("cifar-10-batches-bin", ".bin"), ("cifar-10-batches-py", "")):
        for place in (root, root / inner):
            if (place / f"data_batch_1{suffix}").is_file():
                train = _original_batches(place, [f"data_batch_{i}{suffix}" for i in range(1, 6)])
                test = _original_batches(place, [f"test_batch{suffix}"])
                return _source(train, test, CIFAR10_CLASSES, size)
    source = open_folder(root, size)
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
    return _source(splits[0], splits[1], source.classes, size, source.notes)


def _source(train: Split, test: Split, classes: tuple[str, ...], size: int, notes: tuple[str, ...] = ()) -> Source:
    parts = [split.images.pixels.tobytes() for split in (train, test)]  # type: ignore[attr-defined]
    parts += [split.labels.tobytes() for split in (train, test) if split.labels is not None]
    return Source(train, test, classes, size, CIFAR10_MEAN, CIFAR10_STD, fingerprint(parts), notes)
