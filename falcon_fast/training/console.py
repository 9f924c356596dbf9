"""What a run says while it runs: a progress line on a terminal, plain lines elsewhere, and the rows of metrics.csv."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

TIMINGS = ("images_per_second", "data_wait", "mfu", "seconds")
# They stand last, so that two runs of one seed agree in every column before them.
COLUMNS = (
    "step",
    "epoch",
    "loss",
    "prior",
    "invariance",
    "codes_used",
    "lr",
    "probe_accuracy",
    "nmi_codes",
    "test_codes_used",
    "probe_train_accuracy",
    "grad_norm",
    *TIMINGS,
)
PLAIN_LINE_EVERY = 10.0  # seconds, where there is no terminal


class MetricsFile:
    """metrics.csv: a header, then a row for each logged step; empty where a quantity was not measured.

    Columns: step (optimisation steps done), epoch (fractional), loss, prior and invariance (nats, of that step's batch),
    codes_used (distinct codes in it), lr; on the test split in evaluation mode probe_accuracy (online probe), nmi_codes and
    test_codes_used; probe_train_accuracy (of the batch, augmented); grad_norm (of the network's gradient, before clipping);
    since the row before images_per_second, data_wait (share of the time spent waiting for data) and mfu (the model's FLOP,
    hardware/flops.py, over what the devices could do by their data sheet; empty where that is not known); seconds of training.
    """

    def __init__(self, path: Path, keep_until_step: int = 0) -> None:
        """Opens `path`, keeping the rows up to `keep_until_step`, those that the resumed checkpoint has seen."""
        kept = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if _whole(row) and int(row["step"]) <= keep_until_step]
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        partial.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, row: Mapping[str, Any]) -> None:
        text = {k: "" if v is None else f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
        self._writer.writerow(text)
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _whole(row: Mapping[Any, Any]) -> bool:
    """Whether it has a value for each name of the header, as the last row has not where the disk was full."""
    return None not in row and None not in row.values() and row.get("step", "").isdecimal()


class TrainingDisplay:
    """A context that shows the progress of `total_steps`: images/s, MFU, the loss and its terms, codes in use, time left."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._console = console
        self._total = total_steps
        self._started, self._start_step = time.monotonic(), start_step
        self._last_line = self._started
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[epoch]}"),
                BarColumn(bar_width=20),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=start_step, epoch="", figures="")

    def __enter__(self) -> TrainingDisplay:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def show(self, row: Mapping[str, Any], epochs: int) -> None:
        """A row of metrics.csv was written."""
        epoch = f"epoch {row['epoch']:.1f}/{epochs}"
        mfu = "" if row.get("mfu") is None else f", MFU {row['mfu']:.0%}"
        figures = (
            f"{row['images_per_second']:.0f} images/s ({row['data_wait']:.0%} waiting for data{mfu})  loss {row['loss']:.3f} "
            f"(prior {row['prior']:.3f}, invariance {row['invariance']:.3f})  {row['codes_used']} codes"
        )
        tested = row.get("probe_accuracy")
        if self._progress:
            self._progress.update(self._task, epoch=epoch, figures=figures)
            return
        now = time.monotonic()
        if tested is None and now - self._last_line < PLAIN_LINE_EVERY and row["step"] < self._total:
            return
        self._last_line = now
        remaining = (now - self._started) / max(1, row["step"] - self._start_step) * (self._total - row["step"])
        quality = "" if tested is None else f"  probe {tested:.3f}  NMI {row['nmi_codes']:.3f}"
        self._console.print(f"{epoch}  {figures}{quality}  {remaining:.0f} s left", soft_wrap=True, highlight=False)
