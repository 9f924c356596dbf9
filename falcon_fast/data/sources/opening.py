"""Open the source that a configuration names. Each kind of source has a module of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from falcon_fast.data.sources.cifar import holds_cifar10, holds_cifar100, open_cifar10, open_cifar100
from falcon_fast.data.sources.digits import open_digits
from falcon_fast.data.sources.disk import ABOUT_THE_PATH, unreadable
from falcon_fast.data.sources.folders import holds_imagenet100, open_folder, open_imagenet100
from falcon_fast.data.sources.images import Source, shown
from falcon_fast.data.sources.layout.archives import describe_file
from falcon_fast.data.sources.layout.explicit import Chosen
from falcon_fast.data.sources.svhn import holds_svhn, open_svhn
from falcon_fast.errors import UsageError

if TYPE_CHECKING:
    from falcon_fast.config import DataConfig


SMALL = {"cifar10": open_cifar10, "cifar100": open_cifar100, "svhn": open_svhn}
_ORIGINAL: dict[str, Callable[[Path], bool]] = {
    "cifar10": holds_cifar10,
    "cifar100": holds_cifar100,
    "svhn": holds_svhn,
}


def root_of(config: DataConfig) -> Path:
    """Return the folder of the images that `config` names, as an absolute path."""
    return Path(os.path.abspath(os.path.expanduser(config.path)))


def open_source(config: DataConfig) -> Source:
    """Return the source that `config` names. Its views have `data.size` pixels a side if that is set.

    Raises:
        UsageError: the path does not exist, holds no readable image, or does not belong to this kind of source.
        TemporaryError: the disk cannot be read.
    """
    chosen = Chosen(config.train, config.test)
    if config.source == "digits":
        if config.path or chosen != Chosen():
            raise UsageError(
                "the digits come with scikit-learn and take no --data; for your own images use --recipe folder"
            )
        return open_digits(config.size or 16)
    if not config.path:
        raise UsageError(f"recipe source {config.source!r} needs --data PATH, the folder of the images")
    try:
        root = _folder(config.path)
        if config.source in SMALL:
            if chosen != Chosen() and _ORIGINAL[config.source](root):
                raise UsageError(
                    f"--data {shown(root)} holds original files, which have their own splits: drop data.train and data.test"
                )
            return SMALL[config.source](root, config.size or 32, chosen)
        if config.source == "imagenet100":
            return open_imagenet100(root, config.size, chosen, config.max_pixels)
        return open_folder(root, config.size, chosen=chosen, max_pixels=config.max_pixels)
    except OSError as error:
        if error.errno not in ABOUT_THE_PATH:
            raise unreadable(config.path, error) from None
        raise UsageError(f"--data {shown(config.path)}: {error.strerror or error}") from None


def open_other(path: str, size: int, source: str) -> Source:
    """Return images that a network did not see, to evaluate it on them: any folder, or the original files of a small data set.

    Args:
        path: where they are.
        size: side of a view in pixels.
        source: `data.source` of the network's run. The hundred classes of ImageNet-100 are chosen from an ImageNet folder if the
            run's images were chosen like that; everything else has its own classes.

    Raises:
        UsageError: the path does not exist, holds no readable image, or its splits are not clear.
    """
    try:
        root = _folder(path)
        for name, holds in _ORIGINAL.items():
            if holds(root):
                return SMALL[name](root, size)
        if source == "imagenet100" and holds_imagenet100(root):
            return open_imagenet100(root, size)
        return open_folder(root, size, evaluation=True)
    except OSError as error:
        raise UsageError(f"--data {shown(path)}: {error.strerror or error}") from None


def _folder(path: str) -> Path:
    """Return an existing folder. Raises UsageError for anything else."""
    root = Path(os.path.expanduser(path))
    if not root.exists():
        raise UsageError(f"--data {shown(root)}: no such path")
    if not root.is_dir():
        raise UsageError(f"--data {shown(root)}: {describe_file(root)}")
    return root
