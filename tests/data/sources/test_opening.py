"""Opening a source by its name, and what is said of a path that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from falcon_fast.config import DataConfig, load_recipe, recipe_names, validate
from falcon_fast.data.views.augmentation import augmentation

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


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    assert "not a folder" in refusal(DataConfig(path=str(save(tmp_path / "image.png"))))


@pytest.mark.parametrize("name", ["cifar100", "svhn", "imagenet100"])
def test_their_recipes_are_valid(name: str) -> None:
    assert name in recipe_names()
    config = validate(load_recipe(name))
    assert config.data.source == name and augmentation(config.data.augmentation).crop is not None
