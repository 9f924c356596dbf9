"""One description of a two-view recipe, as data, which every loader executes.

An `Augmentation` only says what may happen to a view and how likely it is. Which of it happens to which image is
counted out by `falcon_fast.data.views.sampling`; the crop or the affine map is carried out by the loaders and everything
after it by `falcon_fast.data.views.photometric`, in this order: colour jitter (its four operations in random order),
grayscale, Gaussian blur, solarise. (The flip commutes with all of these, so it is carried out together with the
crop.)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from falcon_fast.errors import UsageError


@dataclass(frozen=True)
class CropRule:
    """A random resized crop, torchvision's `RandomResizedCrop`, resampled bicubically with antialiasing.

    scale: smallest and largest area of the crop, as a fraction of the image's; drawn uniformly.
    ratio: smallest and largest width / height; drawn log-uniformly.
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
    """A random affine map about the centre of a square image: for digits, which a crop would cut.

    degrees: rotation, uniform in +- degrees.  scale: smallest and largest magnification.
    shift: in +- this fraction of the side, each axis for itself.  shear: along x, uniform in +- degrees.
    """

    degrees: float
    scale: tuple[float, float]
    shift: float
    shear: float

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise UsageError(f"affine scale {self.scale}: give 0 < smallest <= largest")
        if self.degrees < 0 or self.shift < 0 or not 0 <= self.shear < 90:
            raise UsageError("affine degrees, shift and shear are half widths: none may be negative, shear is below 90")


@dataclass(frozen=True)
class Augmentation:
    """What may happen to the two views of an image.

    Exactly one of `crop` and `affine` is set. brightness, contrast, saturation and hue are half widths as in
    torchvision's `ColorJitter`: a factor is uniform in [max(0, 1 - b), 1 + b], the hue shift (in turns) in
    [-hue, hue]; 0 switches one off. Pairs of probabilities are for view 1 and view 2. `blur_sigma` is in pixels,
    `solarize_threshold` in levels of 255.

    Raises UsageError where a value makes no sense.
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
            raise UsageError(f"augmentation {self.name}: jitter strengths must not be negative, hue at most 0.5 turns")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UsageError(f"augmentation {self.name}: blur_sigma {self.blur_sigma}: give 0 < smallest <= largest")


# The table of the FALCON paper's recipes; BYOL's for ImageNet (Grill et al. 2020, appendix B).
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
    """The recipe of that name; a name that does not exist raises UsageError with the nearest one that does."""
    if name in AUGMENTATIONS:
        return AUGMENTATIONS[name]
    near = difflib.get_close_matches(name, AUGMENTATIONS, n=1, cutoff=0.0)[0]
    raise UsageError(f"no augmentation {name!r}: did you mean {near!r}? (there are {', '.join(AUGMENTATIONS)})")
