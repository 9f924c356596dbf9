"""The progress display: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_EVERY = 10.0  # seconds between lines, where there is no terminal


class SteadyOutput:
    """A text stream that goes on when it cannot be written: the log's disk is full, or nobody reads the pipe any more.

    A run must not end because of its messages; metrics.csv holds its figures.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class TrainingDisplay:
    """A context that shows how far the run is: epoch, images/s, MFU, the loss and its terms, codes in use, time left.

    Args:
        total_steps, start_step: optimisation steps of the run, and those that are done already.
    """

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
        """Show that `step` optimisation steps are done."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def show(self, row: Mapping[str, Any], epochs: int) -> None:
        """Show a row of metrics.csv.

        On a terminal every row is shown. Elsewhere a line is printed for every test, at the end, and otherwise every
        PLAIN_LINE_EVERY seconds.

        epochs: those of the whole run.
        """
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
