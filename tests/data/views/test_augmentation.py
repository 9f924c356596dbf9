"""The recipes as data: their numbers, their checks, and the nearest name."""

from __future__ import annotations

import pytest

from falcon_fast.data.views.augmentation import AUGMENTATIONS, AffineRule, Augmentation, CropRule, augmentation
from falcon_fast.errors import UsageError

# Written out a second time, from the recipe table: jitter b, c, s, h; gray; blur v1, v2; solarise v1, v2.
TABLE = {
    "cifar-asymmetric": (0.4, 0.4, 0.2, 0.1, 0.2, (0.0, 0.0), (0.0, 0.2)),
    "symmetric": (0.8, 0.8, 0.8, 0.2, 0.2, (0.5, 0.5), (0.0, 0.0)),
    "imagenet-asymmetric": (0.4, 0.4, 0.2, 0.1, 0.2, (1.0, 0.1), (0.0, 0.2)),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_recipes(name: str) -> None:
    a = augmentation(name)
    numbers = (a.brightness, a.contrast, a.saturation, a.hue, a.gray_probability)
    assert (*numbers, a.blur_probability, a.solarize_probability) == TABLE[name]
    assert a.crop == CropRule(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    assert (a.flip_probability, a.jitter_probability, a.blur_sigma, a.solarize_threshold) == (0.5, 0.8, (0.1, 2.0), 128)


def test_digits() -> None:
    a = augmentation("digits")
    assert a.affine == AffineRule(degrees=15, scale=(0.7, 1.1), shift=0.2, shear=8) and a.crop is None
    assert (a.brightness, a.jitter_probability) == (0.3, 0.8)
    # A mirrored digit is no digit, and a gray image has no colour to jitter.
    assert a.flip_probability == a.contrast == a.saturation == a.hue == a.gray_probability == 0
    assert a.blur_probability == a.solarize_probability == (0.0, 0.0)


def test_names_are_the_keys_and_hashable() -> None:
    assert all(a.name == name for name, a in AUGMENTATIONS.items())
    assert len(set(AUGMENTATIONS.values())) == len(AUGMENTATIONS)


@pytest.mark.parametrize(
    ("wrong", "near"), [("digit", "digits"), ("cifar", "cifar-asymmetric"), ("symetric", "symmetric")]
)
def test_unknown_name_says_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{near}'"):
        augmentation(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop": None},
        {"affine": AffineRule(1, (1, 1), 0, 0)},
        {"flip_probability": 1.5},
        {"blur_probability": (0.5, -0.1)},
        {"hue": 0.6},
        {"contrast": -0.1},
        {"blur_sigma": (0.0, 1.0)},
    ],
)
def test_nonsense_is_refused(wrong: dict) -> None:
    with pytest.raises(UsageError, match="augmentation mine"):
        Augmentation(**{"name": "mine", "crop": CropRule(), **wrong})


def test_rules_refuse_nonsense() -> None:
    with pytest.raises(UsageError, match="scale"):
        CropRule(scale=(0.5, 0.1))
    with pytest.raises(UsageError, match="ratio"):
        CropRule(ratio=(0.0, 1.0))
    with pytest.raises(UsageError, match="scale"):
        AffineRule(10, (0, 1), 0.1, 0)
    with pytest.raises(UsageError, match="shear"):
        AffineRule(10, (1, 1), 0.1, 90)
