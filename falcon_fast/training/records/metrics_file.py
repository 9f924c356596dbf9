"""metrics.csv: one row for each logged step."""

from __future__ import annotations

import csv
import io
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from falcon_fast.errors import UsageError
from falcon_fast.evaluation.report import LARGEST_METRICS
from falcon_fast.files import Appended, written_whole
from falcon_fast.reading import one_line, read_bytes
from falcon_fast.training.records.mending import Kept, backup_of, fingerprint, kept_rows

# The timings are the last columns, so that two runs with the same seed agree in every column before them.
TIMINGS = ("images_per_second", "data_wait", "mfu", "threads", "seconds")
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
    "changes",
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
        changes: settings that were changed on purpose when the run was resumed, so far; result.json lists them.
        bad_steps: steps so far that were skipped, because their loss or gradient is not finite. The row of such a step has its
            loss as it was, nan or inf.
        images_per_second: since the row before.
        data_wait: share of the time since the row before that was spent waiting for data.
        mfu: FLOP of the model (hardware/flops.py) since the row before, divided by those that the devices could do according to
            their data sheets; empty where these are not known.
        threads: of operations on the CPU, when the row was written (hardware/threads.py).
        seconds: of training, from its beginning.
    """

    def __init__(
        self,
        path: Path,
        keep_until_step: int = 0,
        recorded: object = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Open `path`, and keep its rows up to `keep_until_step`, the step of the resumed checkpoint.

        Args:
            recorded: what that checkpoint recorded of the file (`fingerprint`); None if nothing.
            say: takes a line if the file was damaged. The damaged file is kept as metrics.csv.bak.

        Raises:
            UsageError: what is there is no file of rows.
            WriteError: the file cannot be written.
        """
        try:
            found = read_bytes(path, LARGEST_METRICS) if keep_until_step and path.exists() else b""
        except ValueError as error:
            raise UsageError(
                f"{path} is damaged ({one_line(error)}): move it away to continue without its rows"
            ) from None
        kept, problem = kept_rows(found, keep_until_step, recorded, COLUMNS) if keep_until_step else Kept([], None)
        if problem and found:
            backup = backup_of(path)
            with written_whole(backup) as partial:
                partial.write_bytes(found)
            say(f"{path} {problem}; they are kept, and the file as it was found is {backup.name}")
        elif problem:
            say(f"{path} is missing: its rows up to step {keep_until_step} are lost")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept)
        content = text.getvalue().encode()
        with written_whole(path) as partial:
            partial.write_bytes(content)
        self._file = Appended(path)
        self._state = fingerprint(content, len(kept))

    @property
    def state(self) -> dict[str, Any]:
        """The `fingerprint` of the file as it is now."""
        return dict(self._state)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row, which is on disk when this returns. None and missing columns are empty.

        Raises:
            WriteError: the row cannot be written, and then no part of it stays; or the file was removed or renamed.
        """
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"metrics.csv has no column {', '.join(sorted(unknown))}")
        values = (row.get(column) for column in COLUMNS)
        line = self._file.write("" if v is None else f"{v:.9g}" if isinstance(v, float) else v for v in values)
        self._state = {
            "bytes": self._state["bytes"] + len(line),
            "crc32": f"{zlib.crc32(line, int(self._state['crc32'], 16)):08x}",
            "rows": self._state["rows"] + 1,
        }

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
