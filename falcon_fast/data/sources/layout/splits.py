"""Which folders are the training and the test split, and which are classes: the rules.

1. Folders that only wrap are looked through: a folder with a single folder that holds images (`dataset/dataset/...`), or with
   `images/` beside `annotations/`, `masks/` and the like.
2. A folder whose name means training, beside one whose name means test, validation or evaluation: these are the splits
   (`names.py` has the words). Of several folders to test on, test goes before validation, and that before evaluation. One
   without class folders cannot test a labelled run, unless a list of labels comes with it (`labels.py`).
3. A folder whose name means training, without one to test on, is the training split if it is alone, or if it has class folders
   and no folder beside it has. Otherwise it could as well be a class (train, bus, plane): the user must say which.
4. A folder whose name means test, without one to train on, is a class like the others. Where the same class folders lie in it
   and beside it, or nothing lies beside it, the user must say what it is.
5. Where class folders have splits of their own (`bottle/train`, `bottle/test`), nothing is guessed.

In every case that is not decided, and for every decision that does not suit, `data.train` and `data.test` say it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from falcon_fast.data.sources.images import shown
from falcon_fast.data.sources.layout.archives import but
from falcon_fast.data.sources.layout.labels import Listed, listed_labels
from falcon_fast.data.sources.layout.names import KINDS, describes_images, folded, holds_images, role_of
from falcon_fast.data.sources.layout.tree import Folder
from falcon_fast.errors import UsageError

ABOVE = 3  # folders above --data in which ImageNet's lists are looked for: they lie three above Data/CLS-LOC


@dataclass(frozen=True)
class Layout:
    """The splits of a folder.

    Attributes:
        train: the folder of the training split; the folders in it are the classes.
        test: the same for the test split; None if a part of the training split is to be held out.
        listed: the labels of the test split, where a list gives them.
        left_out: what is not used, and why, as phrases for the user.
        notes: other lines for the user.
    """

    train: Folder
    test: Folder | None = None
    listed: Listed | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_layout(top: Folder) -> Layout:
    """Return the splits of a folder by the rules of this module.

    Raises:
        UsageError: the rules do not decide; the message has the option that does.
    """
    folder = top
    left_out: list[str] = []
    while True:
        if (layout := _splits(folder, top)) is not None:
            return Layout(layout.train, layout.test, layout.listed, (*left_out, *layout.left_out))
        inner = _wrapped(folder)
        if inner is None:
            break
        left_out += [
            _count(each, top, "it describes the images") for each in folder.folders if each.count and each is not inner
        ]
        if folder.images:
            left_out.append(f"{_images(len(folder.images))} beside {_shown(inner, top)}")
        folder = inner
    split = [child for child in folder.folders if _has_splits(child)]
    if split:
        names = " and ".join(_shown(child, top) for child in split[:2])
        raise UsageError(
            f"--data {shown(top.path)}: {names}{f' ({len(split)} folders in all)' if len(split) > 2 else ''} "
            f"{'has' if len(split) == 1 else 'have'} training and test folders inside: give one of them "
            f"(--data {shown(split[0].path)}), or sort the images into train/<class>/ and test/<class>/"
        )
    _, testing = _candidates(folder)
    notes = tuple(
        f"{_shown(each, top)} is taken for a class, as no folder beside it is called train" for each in testing
    )
    return Layout(folder, None, None, tuple(left_out), notes)


def unwrapped(folder: Folder, known: Collection[str] = ()) -> Folder:
    """Return the folder whose folders are the classes: this one, or the one that it only wraps.

    known: class names; a folder of such a name is a class, also if it is alone.
    """
    alike = set(map(folded, known))
    while (inner := _wrapped(folder)) is not None and folded(inner.name) not in alike:
        folder = inner
    return folder


def has_classes(folder: Folder, known: Collection[str] = ()) -> bool:
    """Check whether a folder (or the one that it wraps) has class folders.

    known: class names; a single folder is a class folder only if its name is among them. Without them, two are needed.
    """
    inside = [child.name for child in unwrapped(folder, known).folders if child.count]
    return len(inside) >= 2 or not {folded(name) for name in known}.isdisjoint(map(folded, inside))


def classes_of(folder: Folder) -> list[str]:
    """Return the names of the class folders that hold images; empty if there are none, or images beside them."""
    names = [child.name for child in folder.folders if child.count]
    return names if len(names) >= 2 and not folder.images else []


def _wrapped(folder: Folder) -> Folder | None:
    """Return the folder that this one only wraps; None if it holds images or several folders of images."""
    inside = [child for child in folder.folders if child.count]
    holding = [child for child in inside if holds_images(child.name)]
    if len(inside) > 1 and len(holding) == 1:
        inside = [child for child in inside if child is holding[0] or not describes_images(child.name)]
    if len(inside) != 1:
        return None
    if folder.images and not _has_splits(inside[0]):
        return None
    return inside[0]


def _has_splits(folder: Folder) -> bool:
    """Check whether a folder (or the one that it wraps) has a folder to train on beside one to test on."""
    inner: Folder | None = folder
    while inner is not None:
        train, test = _candidates(inner)
        if train and test:
            return True
        only = [child for child in inner.folders if child.count]
        inner = only[0] if len(only) == 1 else None
    return False


def _candidates(folder: Folder) -> tuple[list[Folder], list[Folder]]:
    """Return the folders that may be the training split, and those that may be the test split.

    Names with further words, as in `seg_train`, count only in pairs: `bullet_train` and `test_tube` are classes.
    """
    roles = {child: role for child in folder.folders if child.count and (role := role_of(child.name)) is not None}
    train = {role.rest for role in roles.values() if role.kind == "train"}
    test = {role.rest for role in roles.values() if role.kind != "train"}
    pairs = {rest for rest in train & test if rest}
    alone: set[tuple[str, ...]] = {()}
    if () in train:
        pairs = alone  # the folders that are called train and test alone mean more than other pairs
    elif not pairs:
        pairs = alone & test
    chosen = {child: role.kind for child, role in roles.items() if role.rest in pairs}
    return (
        [child for child, kind in chosen.items() if kind == "train"],
        [child for child, kind in chosen.items() if kind != "train"],
    )


def _splits(folder: Folder, top: Folder) -> Layout | None:
    """Return the splits of a folder that has folders with the names of splits; None if it has none."""
    training, testing = _candidates(folder)
    others = [child for child in folder.folders if child.count and child not in training and child not in testing]
    if not training:
        if testing:
            _check_lonely_test(folder, testing, others, top)
        return None
    train = training[0]
    if len(training) > 1:
        names = " and ".join(_shown(each, top) for each in training)
        raise UsageError(
            f"--data {shown(top.path)}: {names} could be the training split: {_options(train, testing, top)}"
        )
    empty = [
        child for child in folder.folders if not child.count and (role := role_of(child.name)) and role.kind in KINDS
    ]
    if empty and not testing:
        raise UsageError(
            f"--data {shown(empty[0].path)}: no image in it{but(empty[0])}; without it, a tenth of {_shown(train, top)} is held "
            "out: --set data.test=none"
        )
    rivals = [child for child in others if not describes_images(child.name)]
    nested = has_classes(train)
    if not testing and rivals and (not nested or any(has_classes(each) for each in rivals)):
        raise UsageError(
            f"--data {shown(top.path)}: {_shown(train, top)} could be the training split, or a class like "
            f"{_shown(rivals[0], top)}: {_options(train, testing, top)}, or {_setting('train', folder, top)} "
            "if every folder is a class"
        )
    if testing and not nested and sum(not has_classes(each) for each in rivals) > 1 + len(testing):
        raise UsageError(
            f"--data {shown(top.path)}: {_shown(train, top)} and {_shown(testing[0], top)} could be splits, or classes like "
            f"{_shown(rivals[0], top)}: {_options(train, testing, top)}, or {_setting('train', folder, top)} "
            "if every folder is a class"
        )
    test, listed, left_out = _test_of(train, testing, top)
    left_out += [_count(each, top, "not a split") for each in others]
    if folder.images:
        left_out.append(f"{_images(len(folder.images))} beside {_shown(train, top)}")
    return Layout(unwrapped(train), test, listed, tuple(left_out))


def _test_of(train: Folder, testing: Sequence[Folder], top: Folder) -> tuple[Folder | None, Listed | None, list[str]]:
    """Return the test split out of those that may be it, a list of its labels, and what is left out."""
    classes = classes_of(unwrapped(train))
    usable: dict[Folder, Listed | None] = {}
    left_out = {}
    for each in testing:
        inner = unwrapped(each, classes)
        if not classes or has_classes(each, classes) or (inner.images and inner.folders):
            usable[each] = None
            continue
        listed = listed_labels(inner.images, places_of_lists(inner, top))
        if listed is not None and not listed.reason:
            usable[each] = listed
        else:
            why = f"and {listed.name} does not help: {listed.reason}" if listed else "so no labels"
            left_out[each] = f"no class folders, {why}"
    kinds = {each: role.kind for each in testing if (role := role_of(each.name)) is not None}
    best = min((KINDS.index(kinds[each]) for each in usable), default=0)
    chosen = [each for each in usable if kinds[each] == KINDS[best]]
    if len(chosen) > 1:
        names = " and ".join(_shown(each, top) for each in chosen)
        raise UsageError(
            f"--data {shown(top.path)}: {names} could be the test split: say which with {_setting('test', chosen[0], top)}"
        )
    test = chosen[0] if chosen else None
    if test is None:
        return None, None, [_count(each, top, why) for each, why in left_out.items()]
    instead = f"{_shown(test, top)} is the test split"
    phrases = [_count(each, top, left_out.get(each, instead)) for each in testing if each is not test]
    return unwrapped(test, classes), usable[test], phrases


def _check_lonely_test(folder: Folder, testing: Sequence[Folder], others: Sequence[Folder], top: Folder) -> None:
    """Raise UsageError if a folder to test on, without one to train on, may be more than a class."""
    if not others and not folder.images:
        names = " and ".join(_shown(each, top) for each in testing)
        raise UsageError(
            f"--data {shown(top.path)}: {names} but no folder to train on: to train on all images of one, use "
            f"--data {shown(testing[0].path)}"
        )
    beside = {each.name for each in others} | {inner.name for each in others for inner in unwrapped(each).folders}
    for each in testing:
        inside = {inner.name for inner in unwrapped(each).folders if inner.count}
        if inside & beside:
            raise UsageError(
                f"--data {shown(top.path)}: {_shown(each, top)} holds folders with the names of others beside it "
                f"({shown(min(inside & beside))}), so it may be the test split: {_setting('test', each, top)} if it is, "
                f"{_setting('train', folder, top)} if every folder is a class"
            )


def places_of_lists(folder: Folder, top: Folder) -> list[str]:
    """Return where a list of labels may lie: the folder itself and those above it, up to a few above `top`."""
    places = [Path(os.path.abspath(folder.path))]
    places += places[0].parents
    root = Path(os.path.abspath(top.path))
    last = places.index(root) if root in places else 0
    return [str(place) for place in places[: last + 1 + ABOVE]]


def _options(train: Folder, testing: Sequence[Folder], top: Folder) -> str:
    settings = [_setting("train", train, top)] + [_setting("test", each, top) for each in testing[:1]]
    return f"say which with {' '.join(settings)}"


def _setting(split: str, folder: Folder, top: Folder) -> str:
    return f"--set data.{split}={shown(os.path.relpath(folder.path, top.path))}"


def _shown(folder: Folder, top: Folder) -> str:
    return shown(f"{os.path.relpath(folder.path, top.path)}/")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _count(folder: Folder, top: Folder, why: str) -> str:
    return f"{_shown(folder, top)} ({_images(folder.count)}; {why})"
