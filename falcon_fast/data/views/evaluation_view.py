"""The view of an image that evaluation uses: short side resized, centre cropped, no augmentation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

EVALUATION_CROP = 224 / 256  # of the resized short side, for views of EVALUATION_CROP_FROM pixels and more
LONGEST = 16  # short sides
EVALUATION_CROP_FROM = 96  # pixels; smaller views show the whole short side


def evaluation_view(image: Image, size: int) -> Image:
    """Return the `size` x `size` view of an image: short side resized bicubically, then the centre cropped.

    The pixels equal those of torchvision's `Resize` and `CenterCrop`. Views of 96 pixels and more are cropped from an image whose
    short side is 256/224 of the view; smaller views show the whole short side. An image of the view's size is returned as it is.

    An image whose long side exceeds LONGEST short sides is cropped before it is resized: an image of 2 x 20,000 pixels, resized
    whole for views of 224 pixels, takes 3.7 GiB and 37 s. Its pixels may differ from torchvision's by rounding. So at most
    LONGEST (8/7 size)^2 pixels of 4 bytes are made, 4 MiB at 224, in addition to the decoded image.
    """
    from PIL import Image

    if image.size == (size, size):
        return image
    crop = EVALUATION_CROP if size >= EVALUATION_CROP_FROM else 1.0
    width, height = (round(size / crop) * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    if max(image.size) > LONGEST * min(image.size):
        across, down = image.width / width, image.height / height
        box = (left * across, top * down, (left + size) * across, (top + size) * down)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))
