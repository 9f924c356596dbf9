"""The recipes for two views, as data that every loader executes.

An `Augmentation` only says what may happen to a view, and with which probability. `falcon_fast.data.views.sampling` decides what
happens to which image. The loaders carry out the crop or the affine map; `falcon_fast.data.views.photometric` carries out
everything after it, in this order: colour jitter (its four operations in random order), grayscale, Gaussian blur, solarise. (The
flip commutes with all of these, so it is carried out together with the crop.)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from falcon_fast.errors import UsageError


@dataclass(frozen=True)
class CropRule:
    """A random resized crop, as torchvision's `RandomResizedCrop`, resampled bicubically with antialiasing.

    scale: smallest and largest area of the crop, as a fraction of the image's area; drawn uniformly.
    ratio: smallest and largest width / height; drawn log-uniformly.

    Raises UsageError if a range is empty or out of bounds.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(f"crop scale {self.scale}: give 0 < smallest <= largest <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise UsageError(f"crop ratio {self.ratio}: give 0 < smallest <= largest")


@dataclass(frozen=True)
class AffineRule:
    """A random affine map about the centre of a square image; for digits, because a crop would cut them.

    degrees: rotation, uniform in +- degrees.  scale: smallest and largest magnification.
    shift: uniform in +- this fraction of the side, for each axis separately.  shear: along x, uniform in +- degrees.

    Raises UsageError if a value makes no sense.
    """

    degrees: float
    scale: tuple[float, float]
    shift: float
    shear: float

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"affine scale {self.scale}: give 0 < smallest <= largest")
        if self.degrees < 0 or self.shift < 0 or not 0 <= self.shear < 90:
            raise UsageError(
                "affine degrees, shift and shear are half widths: none may be negative, and shear must be below 90"
            )


@dataclass(frozen=True)
class Augmentation:
    """What may happen to the two views of an image.

    Exactly one of `crop` and `affine` is set. brightness, contrast, saturation and hue are half widths as in torchvision's
    `ColorJitter`: a factor is uniform in [max(0, 1 - b), 1 + b], and the hue shift (in turns) in [-hue, hue]; 0 switches an
    operation off. Pairs of probabilities are for view 1 and view 2. `blur_sigma` is in pixels, `solarize_threshold` is a level
    from 0 to 255.

    Raises UsageError if a value makes no sense.
    """

    name: str
    crop: CropRule | None = None
    affine: AffineRule | None = None
    flip_probability: float = 0.0
    jitter_probability: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    gray_probability: float = 0.0
    blur_probability: tuple[float, float] = (0.0, 0.0)
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: tuple[float, float] = (0.0, 0.0)
    solarize_threshold: int = 128

    def __post_init__(self) -> None:
        if (self.crop is None) == (self.affine is None):
            raise UsageError(f"augmentation {self.name}: set exactly one of crop and affine")
        probabilities = (
            self.flip_probability,
            self.jitter_probability,
            self.gray_probability,
            *self.blur_probability,
            *self.solarize_probability,
        )
        if not all(0 <= p <= 1 for p in probabilities):
            raise UsageError(f"augmentation {self.name}: every probability must lie between 0 and 1")
        if min(self.brightness, self.contrast, self.saturation) < 0 or not 0 <= self.hue <= 0.5:
            raise UsageError(
                f"augmentation {self.name}: jitter strengths must not be negative, and hue at most 0.5 turns"
            )
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UsageError(f"augmentation {self.name}: blur_sigma {self.blur_sigma}: give 0 < smallest <= largest")


# From the table of recipes in the FALCON paper; the one for ImageNet is BYOL's (Grill et al. 2020, appendix B).
AUGMENTATIONS: dict[str, Augmentation] = {
    recipe.name: recipe
    for recipe in (
        Augmentation(
            name="cifar-asymmetric",
            crop=CropRule(),
            flip_probability=0.5,
            jitter_probability=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            gray_probability=0.2,
            solarize_probability=(0.0, 0.2),
        ),
        Augmentation(
            name="symmetric",
            crop=CropRule(),
            flip_probability=0.5,
            jitter_probability=0.8,
            brightness=0.8,
            contrast=0.8,
            saturation=0.8,
            hue=0.2,
            gray_probability=0.2,
            blur_probability=(0.5, 0.5),
        ),
        Augmentation(
            name="imagenet-asymmetric",
            crop=CropRule(),
            flip_probability=0.5,
            jitter_probability=0.8,
            brightness=0.4,
            contrast=0.4,
            saturation=0.2,
            hue=0.1,
            gray_probability=0.2,
            blur_probability=(1.0, 0.1),
            solarize_probability=(0.0, 0.2),
        ),
        Augmentation(
            name="digits",
            affine=AffineRule(degrees=15.0, scale=(0.7, 1.1), shift=0.2, shear=8.0),
            jitter_probability=0.8,
            brightness=0.3,
        ),
    )
}


def augmentation(name: str) -> Augmentation:
    """Return the recipe with that name. An unknown name raises UsageError, which names the most similar one."""
    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    near = difflib.get_close_matches(name, AUGMENTATIONS, n=1, cutoff=0.0)[0]
    raise UsageError(
        f"no augmentation {name!r}: did you mean {near!r}? (the augmentations are {', '.join(AUGMENTATIONS)})"
    )
