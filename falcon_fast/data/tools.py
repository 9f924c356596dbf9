"""The work of `falcon-fast data pack` and `falcon-fast data preview`. (`data verify` is in `sources/manifest.py`.)"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from falcon_fast.data.loaders.choose import choose_loader
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.data.sources.decoding import MAX_PIXELS, read_image
from falcon_fast.data.sources.disk import BadImage, MissingFile, check_disk, shown
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import augmentation
from falcon_fast.data.views.photometric import augment
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from falcon_fast.config import Config

JPEG_SIDE = 65500  # pixels, the limit of libjpeg
GAP = 4  # pixels between the pictures of a preview
ROWS = 8  # rows of a preview; then another column of triples begins


def packed_names(root: Path, paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the name of each file in the packed folder: its own relative path, with the extension .jpg.

    Where two files would get the same name, both keep their extension in front of it (`a.png.jpg`, `a.bmp.jpg`).
    """
    relative = {path: path.relative_to(root) for path in paths}
    stems = [name.with_suffix("") for name in relative.values()]
    twice = {
        stem for stem, count in zip(*np.unique(list(map(str, stems)), return_counts=True), strict=True) if count > 1
    }
    return {
        path: name.with_name(f"{name.name}.jpg") if str(name.with_suffix("")) in twice else name.with_suffix(".jpg")
        for path, name in relative.items()
    }


def pack(
    root: Path,
    out: Path,
    paths: Iterable[Path],
    short_side: int,
    quality: int,
    bad: Callable[[Path, str], None],
    done: Callable[[], None],
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Write every image as a JPEG whose short side has at most `short_side` pixels. Return how many images cannot be decoded.

    Folders and names stay the same. The JPEGs are upright and RGB, reduced with Lanczos' filter and never enlarged. Files that
    exist already are left alone, so a run that was interrupted can be continued.

    Args:
        root: the folder of the images.
        out: the folder to write to.
        paths: the image files below `root`.
        short_side: in pixels.
        quality: of the JPEGs, as Pillow counts it.
        bad: called with each image that cannot be packed, and the reason.
        done: called after each image.
        max_pixels: largest width times height of an image.

    Raises:
        UsageError: `out` is `root` or inside it, or cannot be created.
        OSError: a file cannot be written.
        TemporaryError: the disk of the images cannot be read, or memory ran out.
    """
    if out.resolve().is_relative_to(root.resolve()):
        raise UsageError(f"{shown(out)} lies inside {shown(root)}: pack into a folder outside of it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{shown(out)} cannot be created: {error.strerror or error}") from None
    names = packed_names(root, paths)

    def convert(path: Path) -> tuple[Path, str]:
        target = out / names[path]
        if target.exists():
            return path, ""
        try:
            image = _reduced(read_image(path, max_pixels), short_side)
        except MissingFile as error:
            check_disk(str(path), list(map(str, names)))
            return path, str(error)
        except BadImage as error:
            return path, str(error)
        if max(image.size) > JPEG_SIDE:
            return path, f"{image.width} x {image.height} pixels do not fit into a JPEG"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            image.save(partial, "JPEG", quality=quality)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return path, ""

    count = 0
    with ThreadPoolExecutor() as pool:
        for path, reason in pool.map(convert, names):
            if reason:
                count += 1
                bad(path, reason)
            done()
    return count


def _reduced(image: Image, short_side: int) -> Image:
    from PIL.Image import Resampling

    scale = short_side / min(image.size)
    if scale >= 1:
        return image
    width, height = (max(short_side, round(scale * side)) for side in image.size)
    return image.resize((width, height), Resampling.LANCZOS)


def preview(config: Config, count: int) -> tuple[Image, int]:
    """Return a contact sheet of the first `count` images of a run, and how many images are on it.

    Each original stands to the left of the two views that the run sees.

    Raises:
        UsageError: the data cannot be opened, the loader cannot load it, or the views do not fit into memory.
    """
    from PIL import Image, ImageOps

    cpu = torch.device("cpu")
    recipe, source = augmentation(config.data.augmentation), open_source(config.data)
    images, size = source.train.images, source.size
    readable = len(images) - len(source.known_bad)
    clock = Clock(config.training.seed, len(images), min(count, readable), recipe)
    loader, _ = choose_loader(config.data, source, recipe, cpu)
    if loader == "synthetic":
        raise UsageError("the synthetic loader shows no images: use another loader")
    quarantine = Quarantine(images, config.data.max_bad_fraction, known=dict(source.known_bad))
    try:
        batch = next(training_batches(loader, source, clock, range(1), cpu, 0, quarantine=quarantine))
    except MemoryError:
        raise UsageError(f"views of {size} pixels do not fit into memory: give a smaller --size") from None
    colours = augment(batch.views, batch.parameters, torch.zeros(3), torch.ones(3), recipe)
    views = colours.mul(255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    n, step = clock.batch_size, size + GAP
    columns = -(-n // ROWS)
    sheet = Image.new("RGB", (columns * (3 * step + GAP), min(n, ROWS) * step), "white")
    for i, position in enumerate(clock.at(0).positions.tolist()):
        index = next(k for k in clock.candidates(0, position) if k not in quarantine.bad)
        left, top = (i // ROWS) * (3 * step + GAP), (i % ROWS) * step
        original = ImageOps.contain(images.image(index), (size, size))
        for k, picture in enumerate((original, *(Image.fromarray(views[view * n + i]) for view in range(2)))):
            sheet.paste(picture, (left + k * step, top))
    return sheet, n
