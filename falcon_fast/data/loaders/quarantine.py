"""Images that cannot be decoded: they are set aside, replaced in place, and listed in the run directory.

An image is bad when Pillow, having read its file, cannot decode it, whichever loader is used, or when its file alone is gone. An
error of the disk or a lack of memory makes no image bad; it stops the run (`sources/disk.py`).

The position of a bad image in the epoch shows the next good image in the clock's order instead, so no other position shifts: what
a run sees depends on which files are bad, not on when or by which process that was found. Each bad image is reported once and
listed in `quarantine.csv`, when the first step that it belongs to is reached. So all loaders list the same images.

When a run is resumed, each listed image is decoded once more. Those that cannot be decoded stay aside; if that is all of them,
the run continues bit for bit. Those that can be decoded come back, with a line, and leave the list: from the step at which it
resumes, each position of the epoch whose own image has come back shows this image. The order of the epoch does not change.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from falcon_fast.data.sources.changes import Changes
from falcon_fast.data.sources.disk import BadImage
from falcon_fast.data.sources.images import ImageFiles, Images, shown
from falcon_fast.data.views.sampling import BatchPlan, Clock
from falcon_fast.errors import UsageError
from falcon_fast.files import Appended, written_whole
from falcon_fast.reading import csv_records, one_line

LARGEST_LIST = 64 * 2**20  # bytes of quarantine.csv: 300,000 bad images
COLUMNS = ("image", "file", "reason")
T = TypeVar("T")


class Quarantine:
    """The bad images of a training split: their numbers and the reasons.

    Args:
        images: the images of the split, for their names, and to decode again those that are listed.
        max_fraction: largest fraction of the images that may be bad (one may always be bad, unless this is 0).
        path: CSV file that lists the bad images; None to keep no list. Images that the file lists are decoded once more.
        known: bad images found before, number -> reason.
        say: receives one line for each bad image that is found, and one for those that come back.

    Raises:
        UsageError: more images are bad than allowed.
        TemporaryError: a listed file cannot be read, though it may be good.
    """

    def __init__(
        self,
        images: Images,
        max_fraction: float = 0.01,
        path: Path | None = None,
        known: Mapping[int, str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.images, self.max_fraction, self.path, self.say = images, max_fraction, path, say
        self.changes = Changes(images, say)
        listed = self._read(path) if path is not None and path.exists() else {}
        self.bad = {index: reason for index, reason in self._decoded_again(listed, known or {}).items() if reason}
        self.bad |= {index: reason for index, reason in (known or {}).items() if index not in self.bad}
        back = [index for index in listed if index not in self.bad]
        if back:
            others = f" and {len(back) - 1} more" if len(back) > 1 else ""
            say(
                f"can be decoded again and come{'' if others else 's'} back from here on: {images.name(back[0])}{others}"
            )
        if self.bad != listed:
            self._rewrite()
        self.check()

    @property
    def limit(self) -> int:
        """The largest allowed number of bad images."""
        total = len(self.images)
        return min(max(1, int(self.max_fraction * total)) if self.max_fraction > 0 else 0, total - 1)

    def add(self, index: int, reason: str) -> None:
        """Set an image aside and report it. Raises UsageError if too many images are bad now."""
        if index in self.bad:
            return
        self.bad[index] = reason
        if self.path is not None:
            new = not self.path.exists()
            with Appended(self.path) as file:
                for row in [COLUMNS, self._row(index)] if new else [self._row(index)]:
                    file.write(row)
        self.say(f"set aside, cannot be decoded: {self.images.name(index)} ({reason})")
        self.check()

    def check(self) -> None:
        """Raise UsageError if more images are bad than allowed."""
        if len(self.bad) <= self.limit:
            return
        last = list(self.bad)[-1]
        listed = f"; all are in {self.path}" if self.path else ""
        if not self.path and isinstance(self.images, ImageFiles):
            listed = "; `falcon-fast data verify` names them all"
        raise UsageError(
            f"{len(self.bad)} of {len(self.images)} images cannot be decoded, such as {self.images.name(last)} ({self.bad[last]})"
            f"{listed}: more than data.max_bad_fraction {self.max_fraction:g} allows; repair or remove them, or raise this limit"
        )

    def _read(self, path: Path) -> dict[int, str]:
        try:
            rows = [
                (int(row["image"]), shown(row["reason"])) for row in csv_records(path, LARGEST_LIST) if row["image"]
            ]
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(
                f"{path} is damaged ({one_line(error)}): repair it, or delete it to search for bad images again"
            ) from None
        return {index: reason for index, reason in rows if 0 <= index < len(self.images)}

    def _decoded_again(self, listed: Mapping[int, str], known: Mapping[int, str]) -> dict[int, str]:
        """Decode the listed images, except those known to be bad. Return for each why it is bad, or "" if it is not."""

        def reason(index: int) -> str:
            if index in known:
                return known[index]
            try:
                self.images.image(index)
            except BadImage as error:
                return str(error)
            return ""

        with ThreadPoolExecutor() as pool:
            return dict(zip(listed, pool.map(reason, listed), strict=True))

    def _rewrite(self) -> None:
        """Write the whole list in one atomic step; remove it if it is empty."""
        if self.path is None:
            return
        if not self.bad:
            self.path.unlink()
            return
        with written_whole(self.path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *map(self._row, self.bad)])

    def _row(self, index: int) -> tuple[object, ...]:
        return index, shown(self.images.name(index)), self.bad[index]


class Share(NamedTuple, Generic[T]):
    """One rank's images of one step, as `load_share` loaded them."""

    images: list[T]
    indices: np.ndarray  # int64 (n,): the numbers of these images, stand-ins included
    met: dict[int, str]  # the bad images that others stand in for, also those that were known


def load_share(
    clock: Clock, plan: BatchPlan, load: Callable[[int], T], bad: dict[int, str], limit: int
) -> Share[T] | dict[int, str]:
    """Load the images of a plan, and the next good image in place of each bad one. New bad images are added to `bad`.

    Args:
        clock: names the images that stand in for bad ones.
        plan: the step's share of this rank.
        load: loads an image by its number; raises BadImage if it is bad. Other exceptions end this function.
        bad: bad images known so far, number -> reason.
        limit: largest allowed number of bad images.

    Returns:
        A `Share`; or, if more than `limit` images are bad, only the bad images.
    """
    images, indices, met = [], plan.indices.copy(), {}
    for i, position in enumerate(plan.positions):
        for index in clock.candidates(plan.epoch, int(position)):
            if index not in bad:
                try:
                    images.append(load(index))
                    indices[i] = index
                    break
                except BadImage as error:
                    bad[index] = str(error)
            met[index] = bad[index]
            if len(bad) > limit:
                return dict(bad)
        else:
            return dict(bad)  # no readable image is left
    return Share(images, indices, met)
