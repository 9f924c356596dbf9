"""Image files that change during a run: they are noticed when they are read again, named and counted.

A file is known by its size and its time of change, as the scan at the start of the run found them (`ImageFiles.stamps`). The run
goes on with the new contents, because a run that is resumed or repeated would see them, too; but its figures are then not those
of one fixed data set, so the user must know. Looking takes 2 microseconds a file on a local disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from falcon_fast.data.sources.images import Chosen, ImageArray, ImageFiles, Images

NAMED = 10  # files that are named in lines of their own; the others are counted


def change_of(images: Images, index: int) -> str:
    """Return what has changed in the file of an image since the run looked at it first; empty if nothing has.

    A file that is gone has not changed: reading it says so.
    """
    if isinstance(images, Chosen):
        return change_of(images.images, int(images.numbers[index]))
    if not isinstance(images, ImageFiles) or images.stamps is None:
        return ""
    try:
        found = Path(images.paths[index]).stat()
    except OSError:
        return ""
    size, changed = images.stamps[index].tolist()
    if size < 0:  # not known: the file could not be read
        return ""
    if found.st_size != size:
        return f"{size:,} bytes became {found.st_size:,}"
    return "" if found.st_mtime_ns == changed else "written again"


def changes_of(images: Images, indices: Iterable[int]) -> dict[int, str]:
    """Return what has changed in the files of these images: number -> change, for those that have changed."""
    return {int(index): what for index in indices if (what := change_of(images, int(index)))}


class Changes:
    """The image files of one split that have changed since the run began.

    Attributes:
        seen: number of the image -> what has changed.
    """

    def __init__(self, images: Images, say: Callable[[str], None]) -> None:
        self._images, self._say = images, say
        self.seen: dict[int, str] = {}

    def add(self, found: dict[int, str]) -> None:
        """Add files that have changed, and name those that are new to the user."""
        for index, what in found.items():
            if index not in self.seen:
                self.seen[index] = what
                if len(self.seen) <= NAMED:
                    self._say(
                        f"{self._images.name(index)} has changed since the run began ({what}): its new contents are used"
                    )

    def look(self) -> None:
        """Look at the files of all images."""
        if isinstance(self._images, ImageArray):
            return
        with ThreadPoolExecutor() as pool:
            numbers = range(len(self._images))
            found = pool.map(lambda index: change_of(self._images, index), numbers, chunksize=256)
            self.add({index: what for index, what in zip(numbers, found, strict=True) if what})

    def summary(self) -> str:
        """Return a line that counts them; empty if there are none."""
        count = len(self.seen)
        files = "1 image file" if count == 1 else f"{count} image files"
        return f"{files} changed during the run: its figures are not those of one fixed data set" if count else ""
