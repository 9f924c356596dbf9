"""Images that cannot be read: set aside, replaced in place, listed in the run directory.

An image is bad when Pillow cannot decode it, whatever the loader. At its position in the epoch stands the next good image in the
clock's order instead, so that no other position shifts: what a run sees depends on which files are bad, not on when or by
which process that was found. Each one is reported once and listed in `quarantine.csv`, which a resumed run reads again:
a file that was mended in between stays aside until the next run.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from falcon_fast.data.sources.images import ImageFiles, Images, reason_of, shown
from falcon_fast.data.views.sampling import BatchPlan, Clock
from falcon_fast.errors import UsageError

COLUMNS = ("image", "file", "reason")
T = TypeVar("T")


class Quarantine:
    """The bad images of a training split, by number, and why.

    Args:
        images: the split's images, for their names.
        max_fraction: of them that may be bad (one always may, unless this is 0).
        path: where they are listed; None for nowhere. What the file lists already is taken over.
        known: bad images found before, number -> reason.
        left_out: unreadable files that never got a number; they count, too.
        say: takes a line for each bad image that is found.

    Raises:
        UsageError: more are bad than allowed.
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
        """How many numbered images may be bad."""
        total = len(self.images) + len(self.left_out)
        allowed = max(1, int(self.max_fraction * total)) if self.max_fraction > 0 else 0
        return min(allowed - len(self.left_out), len(self.images) - 1)

    def add(self, index: int, reason: str) -> None:
        """Set an image aside. Raises UsageError when too many are."""
        if index in self.bad:
            return
        self.bad[index] = reason
        name = self.images.name(index)
        self._write(index, name, reason)
        self.say(f"set aside, cannot be decoded: {name} ({reason})")
        self.check()

    def check(self) -> None:
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
            f"more than data.max_bad_fraction {self.max_fraction:g} allows; mend or remove them, or raise it"
        )

    def _read(self, path: Path) -> None:
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    if row["image"] and int(row["image"]) < len(self.images):
                        self.bad[int(row["image"])] = row["reason"]
        except (OSError, KeyError, ValueError, TypeError, csv.Error) as error:
            raise UsageError(
                f"{path} is damaged ({error}): mend it, or remove it to look for bad images anew"
            ) from None

    def _write(self, index: int | str, name: str, reason: str) -> None:
        if self.path is None:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(COLUMNS)
            writer.writerow((index, shown(name), reason))


class Share(NamedTuple, Generic[T]):
    """What `load_share` found: one rank's images of one step."""

    images: list[T]
    indices: np.ndarray  # int64 (n,): which images these are, stand-ins included
    found: dict[int, str]  # bad images that were not known before


def load_share(
    clock: Clock, plan: BatchPlan, load: Callable[[int], T], bad: dict[int, str], limit: int
) -> Share[T] | dict[int, str]:
    """Load the images of a plan, a stand-in for each bad one; new bad ones are added to `bad`.

    Returns all the new bad ones instead, with no images, when more than `limit` are bad: a disk that went away makes all bad.
    """
    images, indices, found = [], plan.indices.copy(), {}
    for i, position in enumerate(plan.positions):
        for index in clock.candidates(plan.epoch, int(position)):
            if index in bad:
                continue
            try:
                images.append(load(index))
            except Exception as error:  # Pillow raises whatever its decoders do
                bad[index] = found[index] = reason_of(error)
                if len(bad) > limit:
                    return found
                continue
            indices[i] = index
            break
        else:
            return found  # none is left that can be read
    return Share(images, indices, found)
