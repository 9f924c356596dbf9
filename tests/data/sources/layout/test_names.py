"""What folder names say."""

from __future__ import annotations

import pytest

from falcon_fast.data.sources.layout.names import Role, describes_images, folded, holds_images, role_of


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "train",
            "train Train TRAIN training Training trainset train_set training_set TrainingSet train-images train2017",
        ),
        ("train", "Final_Training train_256 trainval TrainVal training_data images_train"),
        ("test", "test Test TEST testing Testing test_set testset Final_Test PublicTest test1 test_images TESTING"),
        ("val", "val VAL valid Valid validation validation_set val2017 val_256"),
        ("held out", "dev eval evaluation holdout hold-out held_out dev_set"),
    ],
)
def test_names_of_splits(kind: str, names: str) -> None:
    assert {name: role_of(name) for name in names.split()} == {name: Role(kind, ()) for name in names.split()}


def test_other_words_are_shared_by_a_pair() -> None:
    assert role_of("seg_train") == Role("train", ("seg",)) and role_of("seg_test") == Role("test", ("seg",))
    assert role_of("bullet train") == Role("train", ("bullet",))


@pytest.mark.parametrize(
    "name",
    ["trains", "contest", "latest", "device", "value", "n01440764", "0", "", "évaluer", "train_test", "cat", "retest"],
)
def test_names_of_classes(name: str) -> None:
    assert role_of(name) is None


def test_names_are_compared_without_case_and_composition() -> None:
    assert folded("Caf\u00c9") == folded("cafe\u0301") != folded("cafe")


def test_names_of_wrappers_and_of_what_describes_images() -> None:
    assert all(map(holds_images, ["images", "Images", "JPEGImages", "jpg"])) and not holds_images("cat")
    assert all(map(describes_images, ["annotations", "Masks", "ground_truth", "SegmentationClass", "trimaps"]))
    assert not describes_images("images") and not describes_images("cat")
