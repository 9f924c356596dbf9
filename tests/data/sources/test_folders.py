"""Image folders of every layout: splits, classes, what is refused, what is left out; ImageNet-100 out of a thousand classes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from falcon_fast.config import DataConfig
from falcon_fast.errors import TemporaryError

from .opened import folder, names, opened, refusal, refused, save


def test_train_and_test(tmp_path: Path) -> None:
    for split, n in (("train", 3), ("test", 2), ("val", 1)):
        for name in ("b", "a"):
            for i in range(n):
                save(tmp_path / split / name / f"{i}.png")
    source = folder(tmp_path)
    assert names(source.train, tmp_path) == [f"train/{c}/{i}.png" for c in "ab" for i in range(3)]
    assert names(source.test, tmp_path) == [f"test/{c}/{i}.png" for c in "ab" for i in range(2)]
    assert source.classes == ("a", "b")
    assert source.train.labels is not None and source.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test.labels is not None and source.test.labels.tolist() == [0, 0, 1, 1]
    assert source.test.labels.dtype == np.int64
    assert source.notes == (
        "training split train/ (6 images in 2 classes), test split test/ (4 images in 2 classes); "
        "left out: val/ (2 images; test/ is the test split)",
    )


@pytest.mark.parametrize("name", ["val", "validation"])
def test_train_and_val(name: str, tmp_path: Path) -> None:
    for split in ("train", name):
        for c in "ab":
            save(tmp_path / split / c / "x.png")
    source = folder(tmp_path)
    assert names(source.test, tmp_path) == [f"{name}/a/x.png", f"{name}/b/x.png"]
    assert source.notes == (
        f"training split train/ (2 images in 2 classes), test split {name}/ (2 images in 2 classes)",
    )


def test_train_alone_gives_up_a_tenth(tmp_path: Path) -> None:
    for c in "ab":
        for i in range(10):
            save(tmp_path / "train" / c / f"{i}.png")
    source = folder(tmp_path)
    assert (len(source.train.images), len(source.test.images)) == (18, 2)
    assert source.test.labels is not None and source.test.labels.tolist() == [0, 1]
    assert source.classes == ("a", "b")


def test_test_without_train_is_a_class(tmp_path: Path) -> None:
    for c in ("test", "other"):
        for i in range(5):
            save(tmp_path / c / f"{i}.png")
    assert folder(tmp_path).classes == ("other", "test")


def test_a_folder_that_happens_to_be_called_train_is_not_guessed_about(tmp_path: Path) -> None:
    for c in ("train", "bus", "plane"):
        for i in range(5):
            save(tmp_path / c / f"{i}.png")
    message = refusal(DataConfig(path=str(tmp_path)))
    assert "train/ could be the training split, or a class like bus/" in message
    assert "--set data.train=train, or --set data.train=. if every folder is a class" in message
    assert folder(tmp_path, train=".").classes == ("bus", "plane", "train")
    source = folder(tmp_path, train="train")
    assert source.classes == () and len(source.train.images) + len(source.test.images) == 5


def test_no_split_holds_out_a_tenth_of_each_class(image_folder: Path) -> None:
    source = folder(image_folder)
    train, test = names(source.train, image_folder), names(source.test, image_folder)
    assert len(train) == 36 and len(test) == 4 and not set(train) & set(test)
    assert Counter(name.split("/")[0] for name in test) == {"dark": 2, "light": 2}
    for split in (source.train, source.test):
        assert split.labels is not None
        expected = [source.classes.index(name.split("/")[0]) for name in names(split, image_folder)]
        assert split.labels.tolist() == expected
    again = folder(image_folder)
    assert names(again.test, image_folder) == test and again.fingerprint == source.fingerprint
    assert any("4 images" in note for note in source.notes)


def test_the_order_of_the_file_system_plays_no_part(image_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for path in sorted(image_folder.rglob("*.png"), reverse=True):
        (other / path.parent.name).mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(image_folder)).write_bytes(path.read_bytes())
    a, b = folder(image_folder), folder(other)
    assert names(a.test, image_folder) == names(b.test, other) and a.fingerprint == b.fingerprint


@pytest.mark.parametrize("parent", ["", "only"])
def test_without_two_classes_there_are_no_labels(parent: str, tmp_path: Path) -> None:
    for i in range(20):
        save(tmp_path / parent / f"{i:02d}.png")
    source = folder(tmp_path)
    assert source.train.labels is None and source.test.labels is None and source.classes == ()
    assert (len(source.train.images), len(source.test.images)) == (18, 2)
    assert any(note.startswith("no class folders") for note in source.notes)


def test_images_outside_the_class_folders_cost_the_labels_and_are_named_as_the_reason(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png", "cover.png"):
        save(tmp_path / name)
    source = folder(tmp_path)
    assert source.classes == () and len(source.train.images) == 3
    assert any(note.startswith("images outside the class folders") for note in source.notes)


def test_nested_folders_belong_to_the_first(tmp_path: Path) -> None:
    for name in ("a/x/1.png", "a/y/z/2.png", "b/3.png", "b/x/4.png"):
        save(tmp_path / "train" / name)
        save(tmp_path / "test" / name)
    source = folder(tmp_path)
    assert source.train.labels is not None and source.train.labels.tolist() == [0, 0, 1, 1]
    assert source.classes == ("a", "b")


def test_hidden_files_and_other_files_are_no_images(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.PNG", "b/1.JpEg", "b/2.tif"):
        save(tmp_path / name)
    for name in ("a/.hidden.png", ".cache/1.png", "a/.thumbs/1.png", "__MACOSX/._1.png"):
        save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    source = folder(tmp_path)
    every = sorted(names(source.train, tmp_path) + names(source.test, tmp_path))
    assert every == ["a/1.png", "a/2.PNG", "b/1.JpEg", "b/2.tif"]
    assert source.classes == ("a", "b")


def test_links_are_followed_but_not_in_circles(image_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "linked"
    (root / "real").mkdir(parents=True)
    save(root / "real" / "1.png")
    (root / "linked").symlink_to(image_folder / "dark")
    (root / "real" / "up").symlink_to(root)
    (root / "real" / "self").symlink_to(root / "real")
    (root / "far").mkdir()
    (root / "far" / "around").symlink_to(tmp_path)  # a folder above the root
    source = folder(root)
    every = names(source.train, root) + names(source.test, root)
    assert len(every) == len(set(every)) == 21
    assert Counter(name.split("/")[0] for name in every) == {"linked": 20, "real": 1}


def test_unreadable_files_are_left_out_and_counted(image_folder: Path) -> None:
    (image_folder / "dark" / "text.png").write_text("not an image")
    (image_folder / "dark" / "zero.jpg").write_bytes(b"")
    (image_folder / "light" / "link.png").symlink_to("nowhere.png")
    source = folder(image_folder)
    # They have the last numbers, from which they come back if they are repaired while a run is stopped.
    assert len(source.train.images) + len(source.test.images) == 40 + 3
    assert [names(source.train, image_folder)[index] for index, _ in source.known_bad] == [
        "dark/text.png",
        "dark/zero.jpg",
        "light/link.png",
    ]
    assert [index for index, _ in source.known_bad] == [36, 37, 38]
    assert source.train.labels is not None and source.train.labels[36:].tolist() == [0, 0, 1]
    assert any(note.startswith("3 files") and "dark/text.png" in note for note in source.notes)
    (image_folder / "dark" / "zero.jpg").unlink()
    (image_folder / "light" / "link.png").unlink()
    assert any(note.startswith("1 file ") for note in folder(image_folder).notes)


def test_what_is_passed_over_is_said(image_folder: Path) -> None:
    for name in ("list.csv", "notes.TXT", "more.txt", "README"):
        (image_folder / "dark" / name).write_text("x")
    (image_folder / "dark" / ".hidden").write_text("x")
    Image.new("RGB", (20, 20)).save(image_folder / "light" / "moving.gif")
    notes = folder(image_folder).notes
    assert "4 files left out by extension (.txt .csv none)" in notes
    assert any(note.startswith("1 file is not a readable image") and "moving.gif" in note for note in notes)


def test_a_folder_that_cannot_be_listed_is_counted(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir
    (image_folder / "closed").mkdir()

    def refuse(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert any(note.startswith("1 file ") and "closed" in note for note in folder(image_folder).notes)


@pytest.mark.parametrize("where", ["dark", "images"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_while_it_is_listed_is_no_smaller_folder(
    where: str, number: int, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def fail(path: str) -> Any:
        if str(path).endswith(where):
            raise OSError(number, os.strerror(number), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(
        TemporaryError, match=rf"{where} cannot be read: {os.strerror(number)} .*is the disk still there"
    ):
        folder(image_folder)


def test_names_that_would_break_a_line_are_quoted(image_folder: Path) -> None:
    for name in (b"two\nlines.png", b"latin-\xe9.png"):
        (image_folder / os.fsdecode(name)).write_bytes(b"")
        notes = folder(image_folder).notes
        assert all(note.isprintable() for note in notes) and any("1 file" in note for note in notes)
        (image_folder / os.fsdecode(name)).unlink()
    assert "no such path" in refusal(DataConfig(source="folder", path="/no\nwhere"))


def test_folders_without_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert "no image in it" in refusal(DataConfig(path=str(tmp_path)))
    for i in range(3):
        (tmp_path / "a" / f"{i}.png").write_text("no image")
    assert "none of its 3 image files can be read" in refusal(DataConfig(path=str(tmp_path)))
    save(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "test").mkdir()
    assert f"{tmp_path}/test: no image in it" in refusal(DataConfig(path=str(tmp_path)))


def test_one_image_is_not_enough_and_two_are(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    assert "one image" in refusal(DataConfig(path=str(tmp_path)))
    save(tmp_path / "2.png")
    source = folder(tmp_path)
    assert (len(source.train.images), len(source.test.images)) == (1, 1)


def test_a_test_split_with_classes_of_its_own(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"):
        save(tmp_path / name)
    assert "'c'" in refusal(DataConfig(path=str(tmp_path)))
    save(tmp_path / "test" / "1.png")
    assert "outside class folders" in refusal(DataConfig(path=str(tmp_path)))


def test_a_test_split_may_lack_a_class(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/b/1.png"):
        save(tmp_path / name)
    labels = folder(tmp_path).test.labels
    assert labels is not None and labels.tolist() == [1]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(300, 500), (400, 400)], 224),
        ([(10, 8)] * 3, 8),
        ([(223, 900)] * 3, 223),
        ([(50, 90), (90, 60), (300, 300)], 60),
    ],
)
def test_views_have_224_pixels_unless_the_images_have_less(
    sizes: list[tuple[int, int]], expected: int, tmp_path: Path
) -> None:
    for i, size in enumerate(sizes):
        save(tmp_path / "train" / f"{i}.png", size=size)
    save(tmp_path / "test" / "1.png", size=(5, 5))  # the test split has no say
    assert folder(tmp_path).size == expected
    assert folder(tmp_path, size=48).size == 48


def test_the_fingerprint_changes_with_the_data(image_folder: Path, tmp_path: Path) -> None:
    seen = [folder(image_folder).fingerprint]
    assert folder(image_folder).fingerprint == seen[0]

    def changed() -> None:
        seen.append(folder(image_folder).fingerprint)
        assert len(set(seen)) == len(seen)

    save(image_folder / "dark" / "new.png")
    changed()
    save(image_folder / "dark" / "new.png", size=(11, 8))
    changed()
    (image_folder / "dark" / "new.png").rename(image_folder / "light" / "new.png")
    changed()
    (image_folder / "light" / "new.png").rename(image_folder / "light" / "news.png")
    changed()
    (image_folder / "light").rename(image_folder / "bright")
    changed()
    moved = tmp_path / "moved"
    image_folder.rename(moved)  # the same data elsewhere is the same data
    assert folder(moved).fingerprint == seen[-1]


def test_real_photographs(shared: Path) -> None:
    source = folder(shared / "data" / "imagenet-sample")
    assert (len(source.train.images), len(source.test.images)) == (115, 13)  # a tenth of 128 classes of one image each
    assert len(source.classes) == 128 and source.size == 224
    assert source.mean == (0.485, 0.456, 0.406) and source.std == (0.229, 0.224, 0.225)
    assert source.train.labels is not None and len(set(source.train.labels.tolist())) == 115
    for i in range(0, 115, 23):
        assert source.train.images.image(i).mode == "RGB"
        assert source.classes[source.train.labels[i]] == Path(source.train.images.name(i)).parent.name


# ---- ImageNet-100 ----


def imagenet100_names() -> list[str]:
    return (resources.files("falcon_fast.data.sources") / "imagenet100.txt").read_text().split()


def test_imagenet100_takes_its_hundred_classes_out_of_a_thousand(tmp_path: Path) -> None:
    names = imagenet100_names()
    assert len(set(names)) == 100 and all(name[0] == "n" and name[1:].isdigit() for name in names)
    others = ["n00000001", "n99999999"]
    for split, each in (("train", 2), ("val", 1)):
        for name in (*names, *others):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(each):
                Image.new("RGB", (9, 8), (int(name[-2:]), i, 0)).save(tmp_path / split / name / f"{i}.jpg")
    source = opened("imagenet100", tmp_path)
    assert source.classes == tuple(sorted(names))
    assert (len(source.train.images), len(source.test.images)) == (200, 100)
    assert source.train.labels is not None and sorted(source.train.labels) == sorted(list(range(100)) * 2)
    (tmp_path / "val" / names[5]).rename(tmp_path / "elsewhere")
    assert f"no class folder {names[5]}, one of 1 of ImageNet-100" in refused("imagenet100", tmp_path)


def test_imagenet_as_unpacked(tmp_path: Path) -> None:
    """Kaggle's folders: val/ flat with its labels in LOC_val_solution.csv, test/ flat and without labels."""
    chosen, others = imagenet100_names()[:3], ["n00000001", "n00000002"]
    inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for name in (*chosen, *others):
        for i in range(3):
            save(inner / "train" / name / f"{name}_{i}.jpg")
    lines = ["ImageId,PredictionString"]
    for i, name in enumerate((*chosen, *others, chosen[0]), 1):
        save(inner / "val" / f"ILSVRC2012_val_{i:08d}.jpg", i)
        lines.append(f"ILSVRC2012_val_{i:08d},{name} 1 2 3 4 {name} 5 6 7 8")
    for i in range(4):
        save(inner / "test" / f"ILSVRC2012_test_{i:08d}.jpg")
    save(inner / "val" / "ILSVRC2012_val_00000099.jpg")  # the list does not name it
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    (tmp_path / "ILSVRC" / "Annotations" / "CLS-LOC").mkdir(parents=True)
    for root in (tmp_path, inner):
        source = folder(root)
        assert source.classes == tuple(sorted((*chosen, *others)))
        assert (len(source.train.images), len(source.test.images)) == (15, 6)
        assert source.test.labels is not None
        found = [source.classes[label] for label in source.test.labels]
        assert found == [*chosen, *others, chosen[0]]
        assert (
            "test/ (4 images; no class folders, and LOC_val_solution.csv does not help: it names none"
            in source.notes[0]
        )
        assert f"its labels from {tmp_path}/LOC_val_solution.csv" in source.notes[0]
        assert "1 image of the test split without a label in the list left out" in source.notes


def test_imagenet_without_a_list_holds_out_a_tenth(tmp_path: Path) -> None:
    for name in ("train/n01440764/1.jpg", "train/n01443537/1.jpg", "val/1.jpg", "val/2.jpg", "test/1.jpg"):
        save(tmp_path / name)
    source = folder(tmp_path)
    assert {name.split("/")[0] for name in names(source.test, tmp_path)} == {"train"}
    assert "val/ (2 images; no class folders, so no labels)" in source.notes[0]


def test_tiny_imagenet_as_unpacked(tmp_path: Path) -> None:
    wnids = ["n02124075", "n04067472", "n04540053"]
    for wnid in wnids:
        for i in range(4):
            save(tmp_path / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    labels = [wnids[i % 3] for i in (2, 0, 1, 1, 2)]
    for i in range(5):
        save(tmp_path / "val" / "images" / f"val_{i}.JPEG")
        save(tmp_path / "test" / "images" / f"test_{i}.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text(
        "".join(f"val_{i}.JPEG\t{label}\t0\t32\t44\t62\n" for i, label in enumerate(labels))
    )
    (tmp_path / "wnids.txt").write_text("\n".join(reversed(wnids)))
    source = folder(tmp_path)
    assert source.classes == tuple(wnids) and len(source.train.images) == 12
    assert source.train.labels is not None and Counter(source.train.labels.tolist()) == {0: 4, 1: 4, 2: 4}
    assert source.test.labels is not None and [wnids[label] for label in source.test.labels] == labels
    assert [Path(name).name for name in names(source.test, tmp_path)] == [f"val_{i}.JPEG" for i in range(5)]
    assert "left out: test/ (5 images; no class folders, so no labels)" in source.notes[0]
    (tmp_path / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn09999999\n")
    assert "class 'n09999999' is not among those" in refusal(DataConfig(path=str(tmp_path)))


def test_imagenet100_out_of_a_flat_validation_folder(tmp_path: Path) -> None:
    chosen = imagenet100_names()
    for name in (*chosen, "n00000001"):
        save(tmp_path / "train" / name / "1.jpg")
    lines = []
    for i, name in enumerate(("n00000001", *chosen), 1):
        save(tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", 1)
        lines.append(f"ILSVRC2012_val_{i:08d},{name} 1 2 3 4")
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines))
    source = opened("imagenet100", tmp_path)
    assert len(source.classes) == len(source.train.images) == len(source.test.images) == 100
    assert source.test.labels is not None and [source.classes[label] for label in source.test.labels] == chosen
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(lines[:-1]))
    assert f"no class folder {chosen[-1]}, one of 1 of ImageNet-100" in refused("imagenet100", tmp_path)


@pytest.mark.parametrize(
    ("train", "test"),
    [("Training", "Testing"), ("Train", "Test"), ("TRAIN", "VAL"), ("train", "valid"), ("train", "Test")],
)
def test_no_test_image_is_trained_on(train: str, test: str, tmp_path: Path) -> None:
    for i in range(3):
        for c in "ab":
            save(tmp_path / train / c / f"{i}.png")
            save(tmp_path / test / c / f"{i}.png")
    source = folder(tmp_path)
    assert {name.split("/")[0] for name in names(source.train, tmp_path)} == {train}
    assert {name.split("/")[0] for name in names(source.test, tmp_path)} == {test}
    assert source.classes == ("a", "b")
    assert source.notes[0].startswith(f"training split {train}/ (6 images in 2 classes), test split {test}/ (6 images")


def test_the_fingerprint_of_a_folder_is_that_of_earlier_versions(tmp_path: Path) -> None:
    """Runs that began before the rules for splits were written resume: the hash is of these names and sizes, in this order."""
    for name in ("train/a/2.png", "train/a-b/1.png", "train/a/x/1.png", "test/a/1.png", "test/a-b/3.png"):
        save(tmp_path / name)
    files = ["train/a/2.png", "train/a/x/1.png", "train/a-b/1.png", "test/a/1.png", "test/a-b/3.png"]
    digest = hashlib.sha256(b"".join(f"{name}\0{10}x{8}\0".encode() for name in files))
    assert folder(tmp_path).fingerprint == digest.hexdigest()[:16]


def test_folders_without_images_and_links_that_are_not_followed_are_said(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "empty").mkdir()
    for name in ("one", "two"):
        (image_folder / name).symlink_to(tmp_path / "more")
    save(tmp_path / "more" / "1.png")
    os.mkfifo(image_folder / "dark" / "pipe.jpg")
    notes = folder(image_folder).notes
    assert any(note.startswith("1 folder without images, so no class: empty") for note in notes)
    assert any(note.startswith("links that lead where another link leads are not followed: 1") for note in notes)
    assert any("pipe.jpg (not a regular file)" in note for note in notes)


def test_only_archives(tmp_path: Path) -> None:
    for name in ("train/00000.tar", "train/00001.tar", "val/00000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    message = refusal(DataConfig(path=str(tmp_path)))
    assert "no image in it, but 3 tar archives (the first: train/00000.tar), not read: unpack them" in message


def test_the_sample_has_one_of_each_class(shared: Path) -> None:
    source = opened("imagenet100", shared / "data" / "imagenet-sample")
    assert len(source.classes) == 100 and len(source.train.images) + len(source.test.images) >= 100
