"""`falcon-fast data`: check and prepare a folder of images, and see the views that training makes of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from falcon_fast.config import DataConfig
from falcon_fast.errors import UsageError, WriteError
from falcon_fast.files import written_whole
from falcon_fast.training.distributed.signals import stop_line


@click.group(short_help="Verify, pack and preview images.")
def data() -> None:
    """Verify, pack and preview images."""


def _folder(path: Path) -> tuple[Path, list[Path]]:
    """Return the folder that the user named, as an absolute path, and its image files.

    Files that are no images are counted on stderr. Raises UsageError if there is no image.
    """
    from falcon_fast.data.sources.folders import EXTENSIONS, image_paths, left_out_by_name
    from falcon_fast.data.sources.images import shown
    from falcon_fast.data.sources.layout.archives import but, describe_file
    from falcon_fast.data.sources.layout.tree import walk

    root = Path(os.path.abspath(os.path.expanduser(path)))
    if not root.is_dir():
        raise UsageError(f"{shown(root)}: {describe_file(root) if root.exists() else 'no such path'}")
    try:
        top = walk(root)
    except OSError as error:
        raise UsageError(f"{shown(root)}: {error.strerror or error}") from None
    paths = image_paths(top)
    if not paths:
        looked = f" (looked for {' '.join(sorted(EXTENSIONS))})"
        raise UsageError(f"{shown(root)}: no image in it{but(top) or looked}")
    for line in left_out_by_name([top]):
        click.echo(line, err=True)
    return root, paths


def _print_bad(path: Path, reason: str) -> None:
    from falcon_fast.data.sources.images import shown

    click.echo(f"{shown(path)}: {reason}")


@contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[], None]]:
    """Show a progress bar on stderr, if that is a terminal, so that stdout holds only the findings. Yields what advances it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


_max_pixels = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=DataConfig.max_pixels,
    show_default=True,
    help="Largest width times height of an image, as data.max_pixels of a run.",
)


@data.command(short_help="Find the images that cannot be decoded.")
@click.argument("path", type=click.Path(path_type=Path))
@_max_pixels
def verify(path: Path, max_pixels: int) -> None:
    """Decode every image below PATH, and print those that cannot be decoded, with the reason. Exit code 1 if there are any.

    The result is kept in ~/.cache/falcon_fast, and training uses it. If the command is stopped, starting it again continues where
    it was.
    """
    from falcon_fast.data.sources import manifest

    stop_line(lambda: "stopped; what was verified is kept: the same command continues there")
    root, paths = _folder(path)
    with _progress(len(paths), "verifying") as done:
        bad = manifest.verify(root, paths, _print_bad, done, max_pixels)
    sys.exit(1 if bad else 0)


@data.command(short_help="Copy images as smaller JPEG files.")
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--short-side",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Largest short side of an image, in pixels.",
)
@click.option(
    "--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="Quality of the JPEG files, 1 to 100."
)
@_max_pixels
def pack(path: Path, out: Path, short_side: int, quality: int, max_pixels: int) -> None:
    """Copy the images below PATH to OUT as smaller JPEG files, which are faster to decode. Folders and names stay the same.

    Images that cannot be decoded are printed; exit code 1 if there are any. If the command is stopped, starting it again
    continues where it was.
    """
    from falcon_fast.data import tools

    stop_line(lambda: "stopped; the images that were packed are whole: the same command continues there")
    root, paths = _folder(path)
    with _progress(len(paths), "packing") as done:
        bad = tools.pack(root, out, paths, short_side, quality, _print_bad, done, max_pixels)
    sys.exit(1 if bad else 0)


@data.command(short_help="Draw images and their two views.")
@click.argument("path", required=False)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the picture is written, a PNG file."
)
@click.option(
    "--recipe",
    metavar="NAME",
    help="The recipe whose augmentation is shown.",
    show_default="digits, or folder with PATH",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the run whose first views are shown.")
@click.option(
    "--loader",
    metavar="NAME",
    default="auto",
    show_default=True,
    help="What reads the images: auto, dali, resident or workers.",
)
@click.option("--count", type=click.IntRange(1, 64), default=8, show_default=True, help="Number of images to show.")
@click.option(
    "--size", type=click.IntRange(0), default=0, help="Side of a view in pixels.", show_default="as in training"
)
def preview(path: str | None, output: Path, recipe: str | None, seed: int, loader: str, count: int, size: int) -> None:
    """Draw images, each next to its two views, as a run with this recipe and seed sees them in its first step."""
    from falcon_fast import config as configuration
    from falcon_fast.data import tools

    stop_line(lambda: f"stopped; {output} was not written")
    config = configuration.load_recipe(recipe or ("folder" if path else "digits"))
    changes = {"data.loader": loader, "data.size": size, "training.seed": seed}
    if path:
        changes["data.path"] = os.path.abspath(os.path.expanduser(path))
    if output.suffix.lower() != ".png":
        raise UsageError(f"-o {output}: give a name that ends in .png")
    sheet, shown = tools.preview(configuration.validate(configuration.override(config, changes)), count)
    try:
        with written_whole(output) as partial:
            sheet.save(partial, "PNG")
    except WriteError as error:
        raise UsageError(f"-o {error}") from None
    click.echo(f"{output}: {shown} images, original and two views each")
