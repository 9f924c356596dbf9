"""Helpers of the tests of the sources: open a source, or see why it is refused; write and read images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.images import Source, Split
from falcon_fast.data.sources.opening import open_source
from falcon_fast.errors import UsageError


def folder(path: Path | str, size: int = 0, train: str = "", test: str = "") -> Source:
    """Open a folder of images."""
    return open_source(DataConfig(source="folder", path=str(path), size=size, train=train, test=test))


def opened(kind: str, path: Path) -> Source:
    return open_source(DataConfig(source=kind, path=str(path)))


def refusal(config: DataConfig) -> str:
    """The message of the UsageError, which is one line."""
    with pytest.raises(UsageError) as caught:
        open_source(config)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    return message


def refused(kind: str, path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        opened(kind, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(path: Path, level: int = 0, size: tuple[int, int] = (10, 8)) -> Path:
    """Write an image of one gray level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level, level)).save(path)
    return path


def write_class_folders(root: Path, splits: dict[str, tuple[np.ndarray, np.ndarray]], name) -> Path:
    for split, (images, labels) in splits.items():
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = root / split / name(label) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return root


def drawn(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """n noisy images (n, 32, 32, 3) and labels, of every class at least one."""
    random = np.random.RandomState(seed)
    labels = np.concatenate([np.arange(classes), random.randint(0, classes, n - classes)])
    return random.randint(0, 256, (n, 32, 32, 3)).astype(np.uint8), labels


def names(split: Split, root: Path) -> list[str]:
    """The files of a split, relative to `root`."""
    return [str(Path(split.images.name(i)).relative_to(root)) for i in range(len(split.images))]


def pixels(split: Split) -> np.ndarray:
    """All images of a split: uint8 (n, H, W, 3)."""
    return np.stack([np.asarray(split.images.image(i)) for i in range(len(split.images))])
