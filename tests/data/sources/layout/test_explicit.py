"""`data.train` and `data.test`, where the user says what the splits are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from falcon_fast.config import DataConfig
from falcon_fast.data.sources.layout.explicit import Chosen, layout_of
from falcon_fast.errors import UsageError

from ..opened import folder, names, refusal, save
from .made import make


def splits(root: Path, **chosen: str) -> tuple[str, str | None, list[str]]:
    """The folders of both splits, relative to the root, and the classes."""
    layout = layout_of(root, Chosen(**chosen), lambda path: True)
    test = layout.test and os.path.relpath(layout.test.path, root)
    return (
        os.path.relpath(layout.train.path, root),
        test,
        [each.name for each in layout.train.folders if each.count],
    )


def test_every_ambiguous_layout_has_a_setting_that_decides_it(tmp_path: Path) -> None:
    vehicles = make(tmp_path / "vehicles", "{bus,plane,train}/*3")
    assert splits(vehicles, train=".") == (".", None, ["bus", "plane", "train"])
    assert splits(vehicles, train="train") == ("train", None, [])
    beside = make(tmp_path / "beside", "{cat,dog}/*3", "test/{cat,dog}/*1")
    assert splits(beside, test="test") == (".", "test", ["cat", "dog"])
    assert splits(beside, train=".") == (".", None, ["cat", "dog", "test"])
    assert splits(beside, train=".", test="test") == (".", "test", ["cat", "dog"])
    double = make(tmp_path / "double", "{Train,train,Test,test}/{0,1}/*1")
    assert splits(double, train="train", test="test") == ("train", "test", ["0", "1"])
    several = make(tmp_path / "several", "{train,val,valid}/{0,1}/*1")
    assert splits(several, test="valid") == ("train", "valid", ["0", "1"])
    assert splits(several, train="train", test="valid") == ("train", "valid", ["0", "1"])
    assert splits(several, test="none", train="train") == ("train", None, ["0", "1"])


def test_none_holds_out_a_tenth_whatever_folders_there_are(tmp_path: Path) -> None:
    for i in range(10):
        for name in ("train/a", "train/b", "test/a", "test/b"):
            save(tmp_path / name / f"{i}.png")
    source = folder(tmp_path, test="none")
    assert {name.split("/")[0] for name in names(source.train, tmp_path) + names(source.test, tmp_path)} == {"train"}
    assert "left out: test/ (data.test=none)" in source.notes[0]


def test_folders_elsewhere(tmp_path: Path) -> None:
    for i in range(3):
        for name in ("one/a", "one/b", "two/a", "two/b"):
            save(tmp_path / name / f"{i}.png")
    elsewhere = str(tmp_path / "two")
    source = folder(tmp_path / "one", train=".", test=elsewhere)
    assert [Path(source.test.images.name(i)).parent.parent.name for i in range(6)] == ["two"] * 6
    assert source.test.labels is not None and source.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "two").rename(tmp_path / "three")
    assert folder(tmp_path / "one", train=".", test=str(tmp_path / "three")).fingerprint == source.fingerprint


def test_a_training_folder_inside_the_test_folder_is_not_tested_on(tmp_path: Path) -> None:
    make(tmp_path, "all/{a,b}/*2", "all/train/{a,b}/*3")
    layout = layout_of(tmp_path, Chosen("all/train", "all"), lambda path: True)
    assert layout.test is not None and (layout.train.count, layout.test.count) == (6, 4)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("missing", "", "data.train=missing: no such folder in"),
        ("", "a/1.png", "data.test=a/1.png: no such folder in"),
        ("a", "./a", "the same folder"),
        ("a", "flat", "data.test=flat: no class folders in it, while"),
        ("a", "void", "no image in it"),
        ("void", "", "no image in it"),
    ],
)
def test_what_cannot_be_a_split(train: str, test: str, message: str, tmp_path: Path) -> None:
    for name in ("a/x/1.png", "a/y/1.png", "flat/1.png"):
        save(tmp_path / name)
    (tmp_path / "void").mkdir()
    assert message in refusal(DataConfig(path=str(tmp_path), train=train, test=test))


def test_sources_that_have_no_folders_take_none(tmp_path: Path) -> None:
    assert "digits" in refusal(DataConfig(source="digits", train="a"))
    (tmp_path / "data_batch_1.bin").write_bytes(b"")
    assert "drop data.train and data.test" in refusal(DataConfig(source="cifar10", path=str(tmp_path), test="none"))


def test_a_folder_that_cannot_be_listed(tmp_path: Path) -> None:
    with pytest.raises((UsageError, OSError)):
        layout_of(tmp_path / "missing", Chosen(), lambda path: True)
