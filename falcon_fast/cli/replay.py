"""`falcon-fast replay`: one step of a run, taken again with statistics of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.table import Table

    from falcon_fast.runs.layer_statistics import Statistics
    from falcon_fast.runs.replay import Replay

WIDTH = 120  # characters that the table of layers needs, also where the output is not a terminal
SHOWN = 5  # images with the largest gradients


@click.command(short_help="Take one step of a run again, and look inside.")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", type=int, required=True, help="The step, counted from 1 as in metrics.csv and in messages.")
@click.option(
    "--data", metavar="PATH", help="Where the run's images are now.", show_default="where they were in the run"
)
@click.option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.", show_default="that of the run")
@click.option(
    "--max-steps",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    help="Steps that may be taken again to get from a checkpoint to the step; if there are more, the nearest checkpoint's "
    "weights are used.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.", show_default="off")
def replay(run: Path, step: int, data: str | None, device: str | None, max_steps: int, as_json: bool) -> None:
    """Take one step of the run in RUN again, and say which image and which layer first have numbers that are not finite.

    It works for any step. The batch is the same; the weights are those of the checkpoint before it, brought up to the step.
    Nothing in RUN is changed.
    """
    from rich.console import Console

    from falcon_fast.runs import replay as replays
    from falcon_fast.runs.directory import json_text

    console = Console(highlight=False, markup=False, stderr=as_json)
    found = replays.replay(run, step, device, data, max_steps, lambda line: console.print(line, soft_wrap=True))
    if as_json:
        click.echo(json_text(found))
        return
    wide = Console(highlight=False, markup=False, width=max(WIDTH, console.width))
    wide.print(_layers(found))
    wide.print(_images(found))
    for line in _lines(found):
        console.print(line, soft_wrap=True)


def _lines(found: Replay) -> list[str]:
    figures = found.metrics
    lines = [
        f"step {found.step}: loss {figures['loss']:.9g} (prior {figures['prior']:.6g}, invariance "
        f"{figures['invariance']:.6g}), {figures['codes_used']:.0f} codes, norm of the gradient {figures['grad_norm']:.6g}"
    ]
    if found.recorded is not None:
        same = f"{found.recorded:.9g}" == f"{figures['loss']:.9g}"
        lines.append(f"metrics.csv has the loss {found.recorded:.9g} for it{', the same' if same else ''}")
    lines += found.notes
    extreme = [
        layer.name
        for layer in found.layers
        if layer.forward.extreme or (layer.backward is not None and layer.backward.extreme)
    ]
    if extreme:
        lines.append(f"values beyond 10,000, marked !, begin at {extreme[0]}")
    if found.bad:
        lines.append("the step is skipped: its loss or a gradient is not finite")
    lines.append(found.culprit or "all outputs and gradients are finite")
    return lines


def _cells(statistics: Statistics | None) -> list[str]:
    if statistics is None:
        return [""] * 4
    figures = [
        "" if value is None else f"{value:.3g}" for value in (statistics.minimum, statistics.maximum, statistics.rms)
    ]
    figures[1] += " !" if statistics.extreme else ""
    return [*figures, str(statistics.non_finite) if statistics.non_finite else ""]


def _layers(found: Replay) -> Table:
    from rich import box
    from rich.table import Table

    title = f"step {found.step}: outputs of the layers, and gradients with respect to them"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for name in ("layer", "kind"):
        table.add_column(name, overflow="fold")
    for name in ("min", "max", "rms", "bad", "grad min", "grad max", "grad rms", "bad"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(layer.name, layer.kind, *_cells(layer.forward), *_cells(layer.backward))
    table.caption = "bad: entries that are NaN or infinite; the other figures are those of the rest"
    return table


def _images(found: Replay) -> Table:
    from rich import box
    from rich.table import Table

    bad = [image for image in found.images if image.views]
    shown = bad or sorted(found.images, key=lambda image: -(image.gradient_norm or 0.0))[:SHOWN]
    title = "images that are not finite there" if bad else f"the {len(shown)} images with the largest gradients"
    table = Table(title=title, box=box.SIMPLE, pad_edge=False)
    for name in ("position", "image", "file", "views", "norm of the gradient"):
        table.add_column(name, overflow="fold")
    for image in shown:
        norm = "" if image.gradient_norm is None else f"{image.gradient_norm:.3g}"
        table.add_row(str(image.position), str(image.image), image.file, ", ".join(map(str, image.views)), norm)
    return table
