"""The rows that a run records: in metrics.csv and as TensorBoard's events, one for each logged step.

Between rows nothing is read from the device: the metrics of other steps are never read, and times are those of the host.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from falcon_fast.files import why_not_written
from falcon_fast.hardware.flops import step_flops
from falcon_fast.hardware.peaks import known_rate
from falcon_fast.models.network import build_network
from falcon_fast.training.optimizer import Rate
from falcon_fast.training.records.metrics_file import MetricsFile
from falcon_fast.training.run import Run
from falcon_fast.training.step import StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """A context in which process 0 writes RUN/metrics.csv and RUN/tensorboard. The other processes write nothing."""

    def __init__(
        self, run: Run, directory: Path, start_step: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        """Open the files in `directory`, and keep the rows up to `start_step`, the step of the resumed checkpoint.

        say: takes a line if metrics.csv was damaged, or if TensorBoard's events cannot be written. The run goes on without
            the events; metrics.csv has the rows.
        """
        self._run = run
        self._file: MetricsFile | None = None
        self._events: SummaryWriter | None = None
        self._directory, self._say, self._excepthook = directory / "tensorboard", say, threading.excepthook
        if not run.processes.main:
            return
        self._file = MetricsFile(directory / "metrics.csv", start_step, run.recorded, say)
        run.recorded = self._file.state
        if run.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            threading.excepthook = self._no_traceback
            with self._without_events():
                self._events = SummaryWriter(str(self._directory), purge_step=start_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write a row to both, on disk at once. TensorBoard gets a scalar for each measured column except the step itself.

        Raises:
            WriteError: metrics.csv cannot be written.
        """
        if self._file is not None:
            self._file.write(row)
            self._run.recorded = self._file.state
        if self._events is not None:
            with self._without_events():
                for name, value in row.items():
                    if name != "step" and value is not None:
                        self._events.add_scalar(name, value, row["step"])
                self._events.flush()

    def _no_traceback(self, failed: threading.ExceptHookArgs) -> None:
        """Keep the traceback of the thread that writes TensorBoard's events from the user: the next row raises its error."""
        if type(failed.thread).__name__ != "_AsyncWriterThread":
            self._excepthook(failed)

    @contextmanager
    def _without_events(self) -> Iterator[None]:
        """Go on without TensorBoard's events if they cannot be written."""
        try:
            yield
        except OSError as error:
            events, self._events = self._events, None
            self._say(f"{why_not_written(self._directory, error)}; training goes on without TensorBoard's events")
            if events is not None:
                with suppress(OSError):
                    events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)
        if self._events is not None:
            with self._without_events():
                self._events.close()
        threading.excepthook = self._excepthook


class Throughput:
    """Images/s, the share of time spent waiting for data, and model FLOP utilisation (MFU), all since the row before."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._images = run.config.training.batch_size
        self._per_image = utilisation_per_image(run, say)
        self.restart()

    def restart(self) -> None:
        """Start to count again, after a row. Time that was spent on the row itself, for example on a test, does not count."""
        self._since, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step(self, waited: float) -> None:
        """Count a step, for whose batch the loop waited `waited` seconds."""
        self._steps += 1
        self._waited += waited

    def row(self) -> dict[str, float | None]:
        """Return the columns images_per_second, data_wait and mfu of metrics.csv."""
        seconds = time.monotonic() - self._since
        rate = self._steps * self._images / seconds
        mfu = None if self._per_image is None else rate * self._per_image
        return {"images_per_second": rate, "data_wait": self._waited / seconds, "mfu": mfu}


def utilisation_per_image(run: Run, say: Callable[[str], None]) -> float | None:
    """Return the model FLOP utilisation of one image/s: an image's FLOP, divided by the peak FLOP/s of all devices of the run.

    Returns None if the peak is not known (a CPU, a GPU without a data sheet here), or if the network's FLOP cannot be counted,
    which is told to `say`.
    """
    if not run.processes.main or (peak := known_rate(run.device, run.precision)) is None:
        return None
    try:
        flop = step_flops(run.config, build_network(run.config, run.source.size), run.source.size).total
    except Exception as error:  # an operator may fail in any way when its tensors hold no numbers
        say(
            f"the FLOP of {run.config.model.name} cannot be counted ({str(error).splitlines()[0][:200]}): no MFU is logged"
        )
        return None
    return flop / run.config.training.batch_size / (peak * run.processes.world_size)


def metrics_row(run: Run, step: int, metrics: StepMetrics, rate: Rate) -> dict[str, Any]:
    """Return the columns of a row that are not timings. All processes call it together.

    Losses and accuracies are means over the processes. `codes_used` counts the codes in the batch that the prior saw: the global
    batch, or with a local prior process 0's share.

    Args:
        step: optimisation steps done.
        rate: what the schedule makes of the peak learning rate at this step.
    """
    measured = [metrics.loss, metrics.prior, metrics.invariance]
    measured += [] if metrics.probe_accuracy is None else [metrics.probe_accuracy]
    loss, prior, invariance, *accuracy = run.processes.mean(torch.stack(measured)).tolist()
    return {
        "step": step,
        "epoch": step / run.clock.steps_per_epoch,
        "loss": loss,
        "prior": prior,
        "invariance": invariance,
        "codes_used": int(metrics.codes_used),
        "lr": rate.of(run.config.optimizer.lr),
        "grad_norm": None if metrics.grad_norm is None else float(metrics.grad_norm),
        "probe_train_accuracy": accuracy[0] if accuracy else None,
        "changes": len(run.changes),
    }
