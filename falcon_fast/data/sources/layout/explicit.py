"""The splits where the user names them: `data.train` and `data.test`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from falcon_fast.data.sources.images import shown
from falcon_fast.data.sources.layout.labels import listed_labels
from falcon_fast.data.sources.layout.splits import (
    Layout,
    classes_of,
    find_layout,
    has_classes,
    places_of_lists,
    unwrapped,
)
from falcon_fast.data.sources.layout.tree import Folder, walk
from falcon_fast.errors import UsageError

NONE = "none"  # as data.test: hold out a tenth, whatever test folders there are


@dataclass(frozen=True)
class Chosen:
    """The folders of the splits as the user names them, relative to the folder of the images; empty where the rules decide.

    `test` may also be "none".
    """

    train: str = ""
    test: str = ""


def layout_of(root: Path, chosen: Chosen, wanted: Callable[[str], bool]) -> Layout:
    """Return the splits of a folder: those that the user names, and the rest by the rules of `splits.py`.

    Args:
        root: the folder, absolute.
        chosen: what the user names. With `train` alone, a tenth of it is held out.
        wanted: says by its path whether a folder is looked at.

    Raises:
        UsageError: a folder that is named does not exist or cannot be the split, or the rules do not decide.
        OSError: `root` cannot be listed.
    """
    train = _place(root, "train", chosen.train)
    test = None if chosen.test == NONE else _place(root, "test", chosen.test)
    if train == test is not None:
        raise UsageError("data.train and data.test are the same folder: give one of them")
    if train is None and test is None:
        layout = find_layout(walk(root, wanted))
        if chosen.test != NONE or layout.test is None:
            return layout
        relative = shown(f"{os.path.relpath(layout.test.path, root)}/")
        return replace(layout, test=None, listed=None, left_out=(*layout.left_out, f"{relative} (data.test=none)"))

    def looked_at(start: str, without: str | None) -> Folder:
        return walk(start, lambda path: path != without and wanted(path))

    if train is None:
        layout = find_layout(looked_at(str(root), test))
        layout = Layout(layout.train, None, None, layout.left_out, layout.notes)
    else:
        layout = Layout(unwrapped(looked_at(train, test)))
    if test is None:
        return layout
    classes = classes_of(layout.train)
    top = Folder(str(root))
    folder = unwrapped(looked_at(test, train), classes)
    if not classes or has_classes(folder, classes) or not folder.count or folder.folders:
        return replace(layout, test=folder)
    listed = listed_labels(folder.images, places_of_lists(folder, top))
    if listed is None or listed.reason:
        raise UsageError(
            f"data.test={shown(chosen.test)}: no class folders in it, while {shown(layout.train.path)} has {len(classes)}: "
            "sort its images into folders of these names, or use data.test=none"
        )
    return replace(layout, test=folder, listed=listed)


def _place(root: Path, split: str, text: str) -> str | None:
    """Return the absolute path of a split that the user names; None if none is named."""
    if not text:
        return None
    path = Path(os.path.abspath(root / os.path.expanduser(text)))
    if not path.is_dir():
        raise UsageError(f"data.{split}={shown(text)}: no such folder in {shown(root)}")
    return str(path)
