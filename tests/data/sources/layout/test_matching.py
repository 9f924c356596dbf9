"""The classes of both splits are matched by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.layout.matching import match_classes
from falcon_fast.data.sources.layout.tree import Folder
from falcon_fast.errors import UsageError

from ..opened import folder, refusal, save

TRAIN, TEST = Folder("/d/train"), Folder("/d/test")


def test_numbers_are_those_of_the_training_split() -> None:
    assert match_classes(["a", "b", "c"], ["c", "a", "c", "b"], TRAIN, TEST) == ({"a": 0, "b": 1, "c": 2}, [])


def test_classes_without_test_images_are_named() -> None:
    assert match_classes(list("abc"), "aac", TRAIN, TEST)[1] == ["no test images of 1 class: 'b'"]
    assert match_classes(list("abcdef"), "a", TRAIN, TEST)[1] == ["no test images of 5 of 6 classes: 'b', 'c', 'd' ..."]


@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("abz", ["/d/test", "class 'z' is not among those of /d/train"]),
        (["y", "z", "x", "w"], ["4 classes are not among the 2 of /d/train: 'w', 'x', 'y' ...", "data.test=none"]),
        (["A", "b"], ["'A'", "they differ in upper and lower case"]),
        (["a", ""], ["images outside class folders"]),
    ],
)
def test_classes_that_are_not_trained_on_are_refused(test: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        match_classes(["a", "b"], test, TRAIN, TEST)
    assert all(word in str(caught.value) for word in words), caught.value


def test_names_that_unicode_composes_differently_are_the_same(tmp_path: Path) -> None:
    """As on a Mac, whose archives store é as two characters."""
    for name in ("train/caf\u00e9/1.png", "train/th\u00e9/1.png", "test/the\u0301/1.png"):
        save(tmp_path / name)
    source = folder(tmp_path)
    assert source.classes == ("caf\u00e9", "th\u00e9")
    assert source.test.labels is not None and source.test.labels.tolist() == [1]


def test_case_is_not_ignored(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "test/Cat/1.png"):
        save(tmp_path / name)
    assert "'Cat'" in refusal(DataConfig(path=str(tmp_path)))
