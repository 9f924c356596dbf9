"""metrics.csv: one row for each logged step."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    "bad_steps",
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
        bad_steps: steps so far that were skipped, because their loss or gradient is not finite. The row of such a step has its
            loss as it was, nan or inf.
        images_per_second: since the row before.
        data_wait: share of the time since the row before that was spent waiting for data.
        mfu: FLOP of the model (hardware/flops.py) since the row before, divided by those that the devices could do according to
            their data sheets; empty where these are not known.
        seconds: of training, from its beginning.
    """

    def __init__(self, path: Path, keep_until_step: int = 0) -> None:
        """Open `path`, and keep its rows up to `keep_until_step`, the step of the resumed checkpoint."""
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
        """Append a row, which is on disk when this returns. None and missing columns are empty."""
        text = {k: "" if v is None else f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
        self._writer.writerow(text)
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _whole(row: Mapping[Any, Any]) -> bool:
    """Whether a row has a value for each name of the header. The last row does not if the disk was full."""
    return None not in row and None not in row.values() and row.get("step", "").isdecimal()
