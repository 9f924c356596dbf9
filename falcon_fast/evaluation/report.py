"""What people read about a run: the tables at its end and the picture of its curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_fast.errors import UsageError
from falcon_fast.files import written_whole
from falcon_fast.reading import csv_records, one_line

if TYPE_CHECKING:
    from rich.table import Table

LARGEST_METRICS = 64 * 2**20  # bytes of metrics.csv; a row has 150, so these are 440,000 rows
LARGEST_NUMBER = 1e15  # matplotlib's axes overflow long before the largest float
ROWS = (("raw_pixels", "raw pixels"), ("random_init", "random weights"), ("trained", "trained by FALCON"))
COLLAPSE = (
    ("representation", "representation (energy)"),
    ("dimensional", "dimensional (effective rank)"),
    ("cluster", "cluster (code perplexity)"),
    ("intracluster", "intra-cluster (log spread)"),
)


def result_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return the figures of `result.json` as rich tables.

    They are the comparison (only with labels), the NMI by the published protocol if it was measured, and the collapse checks.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    def heading(title: str) -> Table:  # fits 80 columns, rich's width without a terminal
        return Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1))

    tables = []
    trained = result["trained"]
    if trained["probe"] is not None:
        table = heading("frozen features, on the test split")
        for name in ("", "probe", "kNN", "NMI k-means", "NMI codes", "codes"):
            table.add_column(name, justify="left" if not name else "right")
        for key, label in ROWS:
            row = result[key]
            codes = (_figure(row.get("nmi_codes")), str(row.get("codes_used", "")))
            table.add_row(label, _figure(row["probe"]), _figure(row["knn"]), _figure(row["nmi_kmeans"]), *codes)
        tables.append(table)
    if (published := result.get("published")) is not None:
        table = heading("NMI of the codes, in evaluation mode and as published, without eval()")
        for name in ("", "NMI codes", "codes"):
            table.add_column(name, justify="left" if not name else "right")
        table.add_row("evaluation mode", _figure(trained["nmi_codes"]), str(trained["codes_used"]))
        how = f"published: batches of {published['batch_size']}, {published['order']}"
        table.add_row(how, _figure(published["nmi_codes"]), str(published["codes_used"]))
        tables.append(table)
    table = heading("collapse checks, on the test split")
    for name in ("", "embeddings", "backbone", "must exceed", "verdict"):
        table.add_column(name, justify="left" if not name else "right")
    for key, label in COLLAPSE:
        check = trained["collapse"][key]
        verdict = Text("ok", "green") if check["ok"] else Text("COLLAPSED", "red")
        if not _figure(check["value"]):  # too few images, or features that are not finite
            verdict = Text("not measured", "red")
            table.caption, table.caption_justify = Text(check["explanation"], "red"), "left"
        table.add_row(
            label, _figure(check["value"]), _figure(check["backbone_value"]), _figure(check["threshold"]), verdict
        )
    return [*tables, table]


def _figure(value: float | None) -> str:
    """Return a figure as the tables show it; empty if it is missing or not finite."""
    if value is None or not math.isfinite(value):
        return ""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _number(text: str) -> float:
    """Return a cell of metrics.csv as a number that a picture can show, or NaN."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if abs(number) < LARGEST_NUMBER else math.nan


def plot_curves(metrics_csv: Path, picture: Path) -> None:
    """Draw a run's curves from its metrics.csv into one PNG: loss and its terms, codes in use, probe and NMI, against epochs.

    Cells that hold no finite number are left out.

    Raises:
        UsageError: metrics.csv is no CSV file.
        WriteError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured: dict[str, list[tuple[float, float]]] = {}
    try:
        for row in csv_records(metrics_csv, LARGEST_METRICS):
            numbers = {column: _number(text) for column, text in row.items()}
            for column, number in numbers.items():
                if math.isfinite(number) and math.isfinite(epoch := numbers.get("epoch", math.nan)):
                    measured.setdefault(column, []).append((epoch, number))
    except ValueError as error:
        raise UsageError(f"{metrics_csv} is damaged ({one_line(error)}): repair it to draw its curves") from None

    def curve(axes: Any, column: str, label: str, **style: Any) -> None:
        if points := measured.get(column):
            axes.plot(*zip(*points, strict=True), label=label, **style)

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, codes, quality = figure.subplots(1, 3)
    curve(losses, "loss", "loss", color="black", linewidth=1.5)
    curve(losses, "prior", "prior", linewidth=1)
    curve(losses, "invariance", "invariance", linewidth=1)
    curve(codes, "codes_used", "in a batch", linewidth=1)
    curve(codes, "test_codes_used", "on the test split", marker=".")
    curve(quality, "probe_accuracy", "online probe, test split", marker=".")
    curve(quality, "nmi_codes", "NMI of the codes, test split", marker=".")
    for axes, title in ((losses, "loss (nats)"), (codes, "codes in use"), (quality, "against labels")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    codes.set_ylim(bottom=0)
    if quality.lines:
        quality.set_ylim(0, 1)
    else:
        quality.text(0.5, 0.5, "no labels", ha="center", transform=quality.transAxes)
    with written_whole(picture) as partial:
        figure.savefig(partial, dpi=110, format="png")
