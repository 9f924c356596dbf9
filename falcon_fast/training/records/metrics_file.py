"""metrics.csv: one row for each logged step."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.report import LARGEST_METRICS
from falcon_fast.reading import csv_records, one_line

# The timings are the last columns, so that two runs with the same seed agree in every column before them.
TIMINGS = ("images_per_second", "data_wait", "mfu", "seconds")
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


class MetricsFile:
    """metrics.csv: a header, then one row for each logged step. A quantity that was not measured is empty.

    Columns:
        step: optimisation steps done.
        epoch: the same in epochs, fractional.
        loss, prior, invariance: nats, of this step's batch.
        codes_used: distinct codes in the batch.
        lr: learning rate of the network.
        probe_accuracy, nmi_codes, test_codes_used: online probe and clustering by codes on the test split, in evaluation mode.
        probe_train_accuracy: of the online probe on this batch, augmented.
        grad_norm: norm of the network's gradient, before clipping.
        images_per_second: since the row before.
        data_wait: share of the time since the row before that was spent waiting for data.
        mfu: FLOP of the model (hardware/flops.py) since the row before, divided by those that the devices could do according to
            their data sheets; empty where these are not known.
        seconds: of training, from its beginning.
    """

    def __init__(self, path: Path, keep_until_step: int = 0) -> None:
        """Open `path`, and keep its rows up to `keep_until_step`, the step of the resumed checkpoint.

        Raises:
            UsageError: the file that is there is no CSV file.
        """
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            writer.writeheader()
            try:
                for row in csv_records(path, LARGEST_METRICS) if path.exists() else ():
                    if _step(row) <= keep_until_step:
                        writer.writerow(row)
            except ValueError as error:
                partial.unlink()
                raise UsageError(
                    f"{path} is damaged ({one_line(error)}): repair it, or move it away to continue without its rows"
                ) from None
        partial.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, which is on disk when this returns. None and missing columns are empty."""
        text = {k: "" if v is None else f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
        self._writer.writerow(text)
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _step(row: Mapping[str, str]) -> float:
    """Return the step of a row; infinity if it names none."""
    text = row.get("step", "")
    return int(text) if len(text) < 16 and text.isascii() and text.isdecimal() else math.inf
