"""The work of `falcon-fast data pack` and `falcon-fast data preview`. (`data verify` is in `sources/manifest.py`.)"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from falcon_fast.data.loaders.choose import choose_loader
from falcon_fast.data.loaders.quarantine import Quarantine
from falcon_fast.data.loaders.training import training_batches
from falcon_fast.data.sources.decoding import MAX_PIXELS, read_image
from falcon_fast.data.sources.disk import BadImage, MissingFile, check_disk, shown
from falcon_fast.data.sources.layout.names import folded
from falcon_fast.data.sources.opening import open_source
from falcon_fast.data.views.augmentation import augmentation
from falcon_fast.data.views.photometric import augment
from falcon_fast.data.views.sampling import Clock
from falcon_fast.errors import UsageError
from falcon_fast.files import writing, written_whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from falcon_fast.config import Config

JPEG_SIDE = 65500  # pixels, the limit of libjpeg
GAP = 4  # pixels between the pictures of a preview
LONGEST = 255  # bytes of a file name, the limit of most file systems
HASH = 16  # hexadecimal digits of a hash in a name
LAST_FORM = 2  # the last of the forms of a packed name
ROWS = 8  # rows of a preview; then another column of triples begins


def packed_names(root: Path, paths: Iterable[Path]) -> dict[Path, Path]:
    """Return the name of each file in the packed folder: its own relative path, with the extension .jpg.

    Where two files would get the same name, both keep their extension in front of it (`a.png.jpg`, `a.bmp.jpg`). Where that is
    not enough, because there is an `a.png.jpg` already, or because the names differ only in upper and lower case or in how
    Unicode composes their letters (some file systems take such names for one), a hash of the whole name is added. So no two
    files get the same name on any file system, and the names depend on nothing but the names of all files.
    """
    relative = {path: str(path.relative_to(root)) for path in paths}
    forms = dict.fromkeys(relative, 0)
    names = {path: _packed_name(name, 0) for path, name in relative.items()}
    while True:  # at most two more rounds: names with a hash are unique
        seen: dict[str, list[Path]] = {}
        for path, name in names.items():
            seen.setdefault(folded(name), []).append(path)
        alike = [path for group in seen.values() if len(group) > 1 for path in group if forms[path] < LAST_FORM]
        if not alike:
            return {path: Path(name) for path, name in names.items()}
        for path in alike:
            forms[path] += 1
            names[path] = _packed_name(relative[path], forms[path])


def _packed_name(relative: str, form: int) -> str:
    """Return a name for a packed file: with .jpg in place of the extension (0), after it (1), or after it and a hash (2)."""
    folder, slash, name = relative.rpartition(os.sep)
    digest = hashlib.sha256(os.fsencode(relative)).hexdigest()[:HASH]
    ending = (".jpg", ".jpg", f".{digest}.jpg")[form]
    stem = name.rpartition(".")[0] if form == 0 else name
    if len(os.fsencode(stem + ending)) > LONGEST:
        ending = f".{digest}.jpg"
        stem = os.fsdecode(os.fsencode(stem)[: LONGEST - len(ending)])
        if len(stem) and "\udc80" <= stem[-1] <= "\udcff":  # a letter of several bytes was cut
            stem = os.fsencode(stem).decode("utf-8", "ignore")
    return f"{folder}{slash}{stem}{ending}"


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
        WriteError: a file cannot be written.
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
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target, synchronised=False) as partial:
            image.save(partial, "JPEG", quality=quality)
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
