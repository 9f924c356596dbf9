"""metrics.csv: one row a logged step."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
