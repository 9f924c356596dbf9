"""From 12, 16 and 32 bits per channel to 8, so that no readable image becomes black, or nearly, in silence.

Pillow clips such gray images when it converts them to RGB, and of color it keeps the upper 8 of 16 bits. A camera's 12 bits in a
16-bit file would be black. So the rules are stated here, are the same in every loader and tool, and depend on the file alone:

- gray of 16 or 32 bits, integers: if TIFF's tags SMinSampleValue and SMaxSampleValue give a range, that range is scaled to 0 to
  255. Otherwise the brightest pixel tells how many bits the file uses: 8, 10, 12, 14 or 16, above that the smallest number that
  suffices. The upper 8 of these bits are kept.
- gray of a stated depth (TIFF of 12 bits, PGM with a maximum of its own): the upper 8 bits.
- floating-point gray: the range of these tags, otherwise values from 0 to 1, times 255.
- color of 16 bits: the upper 8 bits.

What remains darker than NEARLY_BLACK is refused with a line that says how to convert it, and so are negative values and others
whose scale is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from falcon_fast.data.sources.disk import BadImage

if TYPE_CHECKING:
    from PIL.Image import Image

# Of 255: an image of which no channel reaches this is refused after it was scaled. 12 bits in a 16-bit PPM become 16 at most.
NEARLY_BLACK = 17
DEPTHS = (8, 10, 12, 14, 16)  # bits that cameras and scanners use
BITS_PER_SAMPLE, SAMPLE_FORMAT = 258, 339  # TIFF tags
SAMPLE_RANGE = (340, 341)  # TIFF tags SMinSampleValue and SMaxSampleValue
UNSIGNED = 1

# What `depth_of` returns, and what the user is told of such files.
SCALING = {
    "16-bit gray": "scaled from as many bits as the brightest pixel of each needs (8, 10, 12, 14 or 16) to 8",
    "32-bit gray": "scaled from as many bits as the brightest pixel of each needs to 8",
    "12-bit gray": "the upper 8 bits are used",
    "gray of a stated maximum": "scaled to 8 bits",
    "gray of a stated range": "that range is scaled to 8 bits",
    "floating-point gray": "values from 0 to 1 are scaled to 8 bits",
    "16-bit color": "the upper 8 bits are used",
    "several frames": "the first is used",
}


def depth_of(image: Image) -> str:
    """Return which of the kinds in SCALING an image is, "" for 8 bits; the image is open, but not decoded yet."""
    tags = getattr(image, "tag_v2", {})
    raw, numbers = _encoding(image)
    if image.mode == "F" or image.mode.startswith("I"):
        if _declared(tags):
            return "gray of a stated range"
        if image.mode == "F":
            return "floating-point gray"
        if image.format == "TIFF" and tags.get(BITS_PER_SAMPLE, (0,))[0] == 12:
            return "12-bit gray"
        if image.format == "PPM" and numbers:
            return "gray of a stated maximum"
        return "32-bit gray" if image.format == "TIFF" and tags.get(BITS_PER_SAMPLE, (0,))[0] == 32 else "16-bit gray"
    if (image.format in ("PNG", "TIFF") and "16" in raw) or (image.format == "PPM" and numbers and max(numbers) > 255):
        return "16-bit color"
    return "several frames" if image.format != "MPO" and getattr(image, "is_animated", False) else ""


def _encoding(image: Image) -> tuple[str, list[int]]:
    """Return Pillow's name of the encoding of the pixels, and for PPM the maximum that the file states, if it is not 255."""
    tiles = getattr(image, "tile", None)
    if not tiles:
        return "", []
    name, *_, args = tiles[0]
    args = (args,) if isinstance(args, str) or args is None else args
    plain = name.startswith("ppm")
    return str(args[0]), [number for number in args[1:] if isinstance(number, int)] if plain else []


def _declared(tags: object) -> tuple[float, float] | None:
    """Return the range of values that TIFF's tags give, or None."""
    values = []
    for tag in SAMPLE_RANGE:
        value = tags.get(tag)  # type: ignore[attr-defined]
        value = value[0] if isinstance(value, tuple) and value else value
        if not isinstance(value, (int, float)):
            return None
        values.append(float(value))
    low, high = values
    return (low, high) if np.isfinite([low, high]).all() and low < high else None


def eight_bits(image: Image, depth: str) -> Image:
    """Return a decoded image of mode I, I;16 or F as gray of 8 bits (mode L).

    depth: what `depth_of` said before the image was decoded.

    Raises BadImage if the scale of its values is not known, or if the result would be nearly black.
    """
    from PIL import Image

    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.format == "TIFF" and image.mode == "I" and (tags.get(SAMPLE_FORMAT) or (UNSIGNED,))[0] == UNSIGNED:
        values = values.view(np.uint32)  # Pillow has 32 bits with a sign only
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise BadImage("gray with values that are NaN or infinite: replace them")
    low, high = values.min().item(), values.max().item()
    if declared := _declared(tags):
        least, most = declared
        scaled = ((values.astype(np.float64) - least) * (255 / (most - least))).round().clip(0, 255)
    elif values.dtype.kind == "f":
        if low < 0 or high > 1:
            raise BadImage(
                f"floating-point gray with values from {low:g} to {high:g}: only those from 0 to 1 have a known scale; scale "
                "them to 0 to 1, or write their range into the TIFF tags SMinSampleValue and SMaxSampleValue"
            )
        scaled = (values * np.float32(255)).round()
    elif low < 0:
        raise BadImage(
            f"gray with values from {low} to {high}: the scale of negative values is not known; shift them to 0 and above, or "
            "write their range into the TIFF tags SMinSampleValue and SMaxSampleValue"
        )
    else:
        bits = next((bits for bits in DEPTHS if high < 1 << bits), high.bit_length())
        if depth in ("12-bit gray", "gray of a stated maximum"):  # Pillow stretches the latter to 16 bits
            bits = 12 if depth == "12-bit gray" else 16
        scaled = values >> (bits - 8)
    result = Image.fromarray(scaled.astype(np.uint8))
    refuse_black(result, high, depth)
    return result


def refuse_black(image: Image, brightest: float | None, depth: str) -> None:
    """Raise BadImage if an image of 8 bits, made from more, is nearly black. Gray that is 0 everywhere is black in the file, too.

    brightest: largest value in the file; None if it is not known.
    """
    extrema = image.getextrema()
    most = max(band[1] for band in extrema) if isinstance(extrema[0], tuple) else extrema[1]
    if most < NEARLY_BLACK and brightest != 0:
        value = f", whose brightest value is {brightest:g}" if brightest is not None else ""
        raise BadImage(
            f"{depth}{value}: as 8 bits it would be nearly black; scale its values to the whole range, or save it with 8 bits"
        )


def lines(kinds: Iterable[str]) -> list[str]:
    """Return one line for each kind of file that is not used as it is: how many there are, and what is done with them."""
    counts = Counter(kind for kind in kinds if kind)
    return [
        f"{count} image{'s' if count > 1 else ''} with {kind}: {SCALING[kind]}"
        for kind, count in sorted(counts.items())
        if kind in SCALING
    ]
