"""Opening a source by its name, and what is said of a path that does not fit."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from falcon_fast.config import DataConfig, load_recipe, recipe_names, validate
from falcon_fast.data.sources.cifar import CIFAR10_CLASSES
from falcon_fast.data.sources.opening import open_other
from falcon_fast.data.views.augmentation import augmentation
from falcon_fast.errors import UsageError

from .opened import refusal, save


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/no/such/place", ["/no/such/place", "no such path"]),
        ("~nosuchuser/images", ["~nosuchuser", "no such path"]),
        ("/" + "a" * 5000, ["too long"]),
        ("/a\0b", ["no such path"]),
        ("", ["--data PATH"]),
    ],
)
@pytest.mark.parametrize("source", ["folder", "cifar10"])
def test_a_path_that_is_not_there(source: str, path: str, words: list[str]) -> None:
    message = refusal(DataConfig(source=source, path=path))
    assert all(word in message for word in words), message


def test_other_images_have_their_own_classes(tmp_path: Path, image_folder: Path) -> None:
    for source in ("cifar10", "svhn", "imagenet100", "folder", "digits"):
        other = open_other(str(image_folder), 16, source)
        assert other.classes == ("dark", "light") and other.size == 16 and len(other.test.images) == 4


def test_other_images_without_labels_are_all_evaluated(tmp_path: Path) -> None:
    for i in range(30):
        save(tmp_path / f"{i:02d}.png")
    other = open_other(str(tmp_path), 16, "cifar10")
    assert other.test.labels is None and len(other.test.images) == 30
    assert other.notes[0] == f"no test split and no labels: all of {tmp_path.name}/ (30 images) is evaluated"


def test_other_images_may_be_original_files(tmp_path: Path) -> None:
    rows = np.zeros((20, 1 + 3072), np.uint8)
    rows[:, 0] = np.arange(20) % 10
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows.tofile(tmp_path / f"{name}.bin")
    other = open_other(str(tmp_path), 48, "folder")
    assert other.classes == CIFAR10_CLASSES and other.size == 48 and len(other.test.images) == 20


def test_the_hundred_classes_are_chosen_for_a_run_of_imagenet100(tmp_path: Path) -> None:
    names = (resources.files("falcon_fast.data.sources") / "imagenet100.txt").read_text().split()
    for split in ("train", "val"):
        for name in (*names, "n00000001"):
            save(tmp_path / split / name / "1.png")
    assert len(open_other(str(tmp_path), 16, "imagenet100").classes) == 100
    assert len(open_other(str(tmp_path), 16, "folder").classes) == 101


@pytest.mark.parametrize(
    ("path", "message"),
    [("missing", "no such path"), ("file.zip", "a ZIP archive, not a folder: unpack it: "), ("void", "no image")],
)
def test_what_cannot_be_evaluated_on(path: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.zip").touch()
    (tmp_path / "void").mkdir()
    with pytest.raises(UsageError, match=message):
        open_other(str(tmp_path / path), 16, "folder")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    assert "not a folder" in refusal(DataConfig(path=str(save(tmp_path / "image.png"))))


@pytest.mark.parametrize("name", ["cifar100", "svhn", "imagenet100"])
def test_their_recipes_are_valid(name: str) -> None:
    assert name in recipe_names()
    config = validate(load_recipe(name))
    assert config.data.source == name and augmentation(config.data.augmentation).crop is not None
