"""Sources by name: the digits here, the others in files of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from falcon_fast.data.sources.cifar import open_cifar10, open_cifar100
from falcon_fast.data.sources.folders import open_folder, open_imagenet100
from falcon_fast.data.sources.images import ImageArray, Source, Split, fingerprint, shown
from falcon_fast.data.sources.svhn import open_svhn
from falcon_fast.errors import UsageError

if TYPE_CHECKING:
    from falcon_fast.config import DataConfig


SMALL = {"cifar10": open_cifar10, "cifar100": open_cifar100, "svhn": open_svhn}


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
        root = Path(os.path.expanduser(config.path))
        if not root.exists():
            raise UsageError(f"--data {shown(root)}: no such path")
        if not root.is_dir():
            raise UsageError(f"--data {shown(root)}: not a folder (unpack an archive first)")
        if config.source in SMALL:
            return SMALL[config.source](root, config.size or 32)
        return open_imagenet100(root, config.size) if config.source == "imagenet100" else open_folder(root, config.size)
    except OSError as error:  # no permission, too long a name
        raise UsageError(f"--data {shown(config.path)}: {error.strerror or error}") from None


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
        fingerprint=fingerprint([digits.images.astype(np.uint8).tobytes()]),
    )
