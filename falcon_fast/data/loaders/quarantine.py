"""Images that cannot be read: they are set aside, replaced in place, and listed in the run directory.

An image is bad when Pillow cannot decode it, whichever loader is used. Its position in the epoch shows the next good image in the
clock's order instead, so no other position shifts: what a run sees depends on which files are bad, not on when or by which
process that was found. Each bad image is reported once and listed in `quarantine.csv`. A resumed run reads this list again, so a
file that was repaired in between stays set aside until the next run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from falcon_fast.data.sources.changes import Changes
from falcon_fast.data.sources.images import ImageFiles, Images, reason_of, shown
from falcon_fast.data.views.sampling import BatchPlan, Clock
from falcon_fast.errors import UsageError
from falcon_fast.files import Appended
from falcon_fast.reading import csv_records, one_line

LARGEST_LIST = 64 * 2**20  # bytes of quarantine.csv: 300,000 bad images
COLUMNS = ("image", "file", "reason")
T = TypeVar("T")


class Quarantine:
    """The bad images of a training split: their numbers and the reasons.

    Args:
        images: the images of the split, for their names.
        max_fraction: largest fraction of the images that may be bad (one may always be bad, unless this is 0).
        path: CSV file that lists the bad images; None to keep no list. Images that the file lists already are taken over.
        known: bad images found before, number -> reason.
        left_out: unreadable files that never got a number; they count as bad, too.
        say: receives one line for each bad image that is found.

    Raises:
        UsageError: more images are bad than allowed.
    """

    def __init__(
        self,
        images: Images,
        max_fraction: float = 0.01,
        path: Path | None = None,
        known: Mapping[int, str] | None = None,
        left_out: tuple[tuple[str, str], ...] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.images, self.max_fraction, self.path, self.say = images, max_fraction, path, say
        self.left_out = left_out
        self.changes = Changes(images, say)
        self.bad: dict[int, str] = {}
        listed = path is not None and path.exists()
        if path is not None and listed:
            self._read(path)
        for name, reason in () if listed else left_out:
            self._write("", name, reason)
        for index, reason in (known or {}).items():
            if index not in self.bad:
                self.bad[index] = reason
                self._write(index, images.name(index), reason)
        self.check()

    @property
    def limit(self) -> int:
        """The largest allowed number of bad images among those that have a number."""
        total = len(self.images) + len(self.left_out)
        allowed = max(1, int(self.max_fraction * total)) if self.max_fraction > 0 else 0
        return min(allowed - len(self.left_out), len(self.images) - 1)

    def add(self, index: int, reason: str) -> None:
        """Set an image aside and report it. Raises UsageError if too many images are bad now."""
        if index in self.bad:
            return
        self.bad[index] = reason
        name = self.images.name(index)
        self._write(index, name, reason)
        self.say(f"set aside, cannot be decoded: {name} ({reason})")
        self.check()

    def check(self) -> None:
        """Raise UsageError if more images are bad than allowed."""
        if len(self.bad) <= self.limit:
            return
        count, total = len(self.bad) + len(self.left_out), len(self.images) + len(self.left_out)
        if self.bad:
            last = list(self.bad)[-1]
            example = f"{self.images.name(last)} ({self.bad[last]})"
        else:
            example = f"{shown(self.left_out[0][0])} ({self.left_out[0][1]})"
        listed = f"; all are in {self.path}" if self.path else ""
        if not self.path and isinstance(self.images, ImageFiles):
            listed = "; `falcon-fast data verify` names them all"
        raise UsageError(
            f"{count} of {total} images cannot be decoded, such as {example}{listed}: "
            f"more than data.max_bad_fraction {self.max_fraction:g} allows; repair or remove them, or raise this limit"
        )

    def _read(self, path: Path) -> None:
        try:
            for row in csv_records(path, LARGEST_LIST):
                if row["image"] and 0 <= (index := int(row["image"])) < len(self.images):
                    self.bad[index] = shown(row["reason"])
        except (OSError, KeyError, ValueError) as error:
            raise UsageError(
                f"{path} is damaged ({one_line(error)}): repair it, or delete it to search for bad images again"
            ) from None

    def _write(self, index: int | str, name: str, reason: str) -> None:
        if self.path is None:
            return
        new = not self.path.exists()
        with Appended(self.path) as file:
            if new:
                file.write(COLUMNS)
            file.write((index, shown(name), reason))


class Share(NamedTuple, Generic[T]):
    """One rank's images of one step, as `load_share` loaded them."""

    images: list[T]
    indices: np.ndarray  # int64 (n,): the numbers of these images, stand-ins included
    found: dict[int, str]  # bad images that were not known before


def load_share(
    clock: Clock, plan: BatchPlan, load: Callable[[int], T], bad: dict[int, str], limit: int
) -> Share[T] | dict[int, str]:
    """Load the images of a plan, and the next good image in place of each bad one. New bad images are added to `bad`.

    Args:
        clock: names the images that stand in for bad ones.
        plan: the step's share of this rank.
        load: loads an image by its number; any exception that it raises makes the image bad.
        bad: bad images known so far, number -> reason.
        limit: largest allowed number of bad images.

    Returns:
        A `Share`; or, if more than `limit` images are bad, only the new bad images (when a disk disappears, all images are bad).
    """
    images, indices, found = [], plan.indices.copy(), {}
    for i, position in enumerate(plan.positions):
        for index in clock.candidates(plan.epoch, int(position)):
            if index in bad:
                continue
            try:
                images.append(load(index))
            except Exception as error:  # Pillow's decoders raise many types
                bad[index] = found[index] = reason_of(error)
                if len(bad) > limit:
                    return found
                continue
            indices[i] = index
            break
        else:
            return found  # no readable image is left
    return Share(images, indices, found)
