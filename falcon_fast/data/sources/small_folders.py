"""Folders of 32 x 32 images: CIFAR and SVHN, whose original files hold arrays, unpacked into class folders."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.folders import open_folder
from falcon_fast.data.sources.images import ImageArray, ImageFiles, Images, Split, shown
from falcon_fast.data.sources.layout.explicit import Chosen
from falcon_fast.errors import UsageError


def open_small_folders(
    root: Path, name: str, classes: int, files: str, chosen: Chosen | None = None
) -> tuple[Split, Split, tuple[str, ...], tuple[str, ...]]:
    """Return both splits, decoded into memory, the class names, and the notes of the folder.

    Args:
        root: the folder.
        name: name of the data set, for messages.
        classes: number of class folders that it must have.
        files: the original files that would also be accepted, for messages.
        chosen: the folders of the splits where the user names them.

    Raises:
        UsageError: this is no such folder, or an image is damaged or has another size.
    """
    source = open_folder(root, 32, chosen=chosen)
    if len(source.classes) != classes:
        count = {10: "ten", 100: "a hundred"}[classes]
        raise UsageError(
            f"--data {shown(root)} is not {name}: it needs {files} (original files), "
            f"or train/<class>/ and test/<class>/ folders of {count} classes"
        )
    splits = []
    assert isinstance(source.train.images, ImageFiles)
    unreadable = [index for index, size in enumerate(source.train.images.sizes or ()) if size == (0, 0)]
    for split in (
        source.train.without(unreadable),
        source.test,
    ):  # 60,000 files of 1 KB: decoded once (5 s) rather than once per epoch

        def pixels(index: int, images: Images = split.images) -> np.ndarray:
            try:
                return np.asarray(images.image(index))
            except BadImage as error:
                raise UsageError(f"{images.name(index)} cannot be decoded ({error}): repair or remove it") from None

        with ThreadPoolExecutor() as pool:
            arrays = list(pool.map(pixels, range(len(split.images))))
        if any(array.shape != (32, 32, 3) for array in arrays):
            raise UsageError(
                f"--data {shown(root)} is not {name}: its images must be 32 x 32; for other sizes use --recipe folder"
            )
        splits.append(Split(ImageArray(np.stack(arrays)), split.labels))
    return splits[0], splits[1], source.classes, source.notes
