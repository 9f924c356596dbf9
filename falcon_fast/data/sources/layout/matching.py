"""The classes of the test split matched with those of the training split, by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from falcon_fast.data.sources.images import shown
from falcon_fast.data.sources.layout.tree import Folder
from falcon_fast.errors import UsageError

_NAMED = 3  # names of classes that a message shows


def match_classes(
    train_classes: Sequence[str], test_classes: Iterable[str], train: Folder, test: Folder
) -> tuple[dict[str, int], list[str]]:
    """Return the number of each class name of both splits, and lines for the user on classes without test images.

    Names that differ only in how Unicode composes their letters are the same: some systems and archives store `é` as one
    character, others as two.

    Args:
        train_classes: the classes of the training split, sorted; their positions are their numbers.
        test_classes: the class of each test image; "" for an image outside of the class folders.
        train, test: the folders, for messages.

    Raises:
        UsageError: the test split has classes that the training split has not, or images outside of its class folders.
    """
    numbers = {name: number for number, name in enumerate(train_classes)}
    composed = {unicodedata.normalize("NFC", name): number for name, number in numbers.items()}
    found = set(test_classes)
    if "" in found:
        raise UsageError(
            f"--data {shown(test.path)}: images outside class folders, while {shown(train.path)} has class folders: sort them "
            "into folders, or use --set data.test=none"
        )
    unknown = []
    for name in sorted(found - numbers.keys()):
        number = composed.get(unicodedata.normalize("NFC", name))
        if number is None:
            unknown.append(name)
        else:
            numbers[name] = number
    if unknown:
        folded = {name.casefold() for name in train_classes}
        case = " (they differ in upper and lower case)" if all(name.casefold() in folded for name in unknown) else ""
        what = (
            f"class {_names(unknown)} is not among those"
            if len(unknown) == 1
            else f"{len(unknown)} classes are not among the {len(train_classes)}"
        )
        which = "" if len(unknown) == 1 else f": {_names(unknown)}"
        raise UsageError(
            f"--data {shown(test.path)}: {what} of {shown(train.path)}{which}{case}: rename or remove them, or name other "
            "folders with data.train and data.test (--set data.test=none holds out a tenth)"
        )
    tested = {numbers[name] for name in found}
    missing = [name for number, name in enumerate(train_classes) if number not in tested]
    if not missing:
        return numbers, []
    classes = "1 class" if len(missing) == 1 else f"{len(missing)} of {len(train_classes)} classes"
    return numbers, [f"no test images of {classes}: {_names(missing)}"]


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_NAMED])) + (" ..." if len(names) > _NAMED else "")
