"""Open the source that a configuration names. Each kind of source has a module of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_fast.data.sources.cifar import open_cifar10, open_cifar100
from falcon_fast.data.sources.digits import open_digits
from falcon_fast.data.sources.disk import ABOUT_THE_PATH, unreadable
from falcon_fast.data.sources.folders import open_folder, open_imagenet100
from falcon_fast.data.sources.images import Source, shown
from falcon_fast.data.sources.svhn import open_svhn
from falcon_fast.errors import UsageError

if TYPE_CHECKING:
    from falcon_fast.config import DataConfig


SMALL = {"cifar10": open_cifar10, "cifar100": open_cifar100, "svhn": open_svhn}


def root_of(config: DataConfig) -> Path:
    """Return the folder of the images that `config` names."""
    return Path(os.path.expanduser(config.path))


def open_source(config: DataConfig) -> Source:
    """Return the source that `config` names. Its views have `data.size` pixels a side if that is set.

    Raises:
        UsageError: the path does not exist, holds no readable image, or does not belong to this kind of source.
        TemporaryError: the disk cannot be read.
    """
    if config.source == "digits":
        if config.path:
            raise UsageError(
                "the digits come with scikit-learn and take no --data; for your own images use --recipe folder"
            )
        return open_digits(config.size or 16)
    if not config.path:
        raise UsageError(f"recipe source {config.source!r} needs --data PATH, the folder of the images")
    try:
        root = root_of(config)
        if not root.exists():
            raise UsageError(f"--data {shown(root)}: no such path")
        if not root.is_dir():
            raise UsageError(f"--data {shown(root)}: not a folder (unpack an archive first)")
        if config.source in SMALL:
            return SMALL[config.source](root, config.size or 32)
        if config.source == "imagenet100":
            return open_imagenet100(root, config.size, config.max_pixels)
        return open_folder(root, config.size, None, config.max_pixels)
    except OSError as error:
        if error.errno not in ABOUT_THE_PATH:
            raise unreadable(config.path, error) from None
        raise UsageError(f"--data {shown(config.path)}: {error.strerror or error}") from None
