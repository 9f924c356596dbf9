"""What a run records: a row of metrics.csv and of TensorBoard's events for each logged step, and a line for who watches.

Between rows nothing asks the device: the metrics of other steps are never read, and times are the host's own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from falcon_fast.hardware.flops import step_flops
from falcon_fast.hardware.peaks import known_rate
from falcon_fast.models.network import build_network
from falcon_fast.training.records.metrics_file import MetricsFile
from falcon_fast.training.run import Run
from falcon_fast.training.step import StepMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class RunLog:
    """A context in which process 0 writes RUN/metrics.csv and RUN/tensorboard; in the others, nothing is written."""

    def __init__(self, run: Run, directory: Path, start_step: int) -> None:
        """Keeps what was logged up to `start_step`, which the resumed checkpoint has seen."""
        self._file: MetricsFile | None = None
        self._events: SummaryWriter | None = None
        if not run.processes.main:
            return
        self._file = MetricsFile(directory / "metrics.csv", keep_until_step=start_step)
        if run.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1)

    def write(self, row: Mapping[str, Any]) -> None:
        """Both on disk at once. TensorBoard has a scalar for each column that was measured, but for the step itself."""
        if self._file is not None:
            self._file.write(row)
        if self._events is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._events.add_scalar(name, value, row["step"])
            self._events.flush()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.__exit__(*exception)
        if self._events is not None:
            self._events.close()


class Throughput:
    """Images/s, the share of the time spent waiting for data, and MFU, since the row before."""

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._images = run.config.training.batch_size
        self._per_image = utilisation_per_image(run, say)
        self.restart()

    def restart(self) -> None:
        """After a row: what was done for it (a test, say) does not count."""
        self._since, self._steps, self._waited = time.monotonic(), 0, 0.0

    def step(self, waited: float) -> None:
        """A step was taken, for whose batch the loop waited `waited` seconds."""
        self._steps += 1
        self._waited += waited

    def row(self) -> dict[str, float | None]:
        """The columns of metrics.csv."""
        seconds = time.monotonic() - self._since
        rate = self._steps * self._images / seconds
        mfu = None if self._per_image is None else rate * self._per_image
        return {"images_per_second": rate, "data_wait": self._waited / seconds, "mfu": mfu}


def utilisation_per_image(run: Run, say: Callable[[str], None]) -> float | None:
    """What an image/s is worth in model FLOP utilisation: its FLOP over the peak FLOP/s of all devices of the run.

    None where the peak is not known (a CPU, a GPU without a data sheet in `peaks`), and with a line to `say` where the
    network's FLOP cannot be counted.
    """
    if not run.processes.main or (peak := known_rate(run.device, run.precision)) is None:
        return None
    try:
        flop = step_flops(run.config, build_network(run.config, run.source.size), run.source.size).total
    except Exception as error:  # whatever an operator does that cannot work without numbers
        say(
            f"the FLOP of {run.config.model.name} cannot be counted ({str(error).splitlines()[0][:200]}): no MFU is logged"
        )
        return None
    return flop / run.config.training.batch_size / (peak * run.processes.world_size)


def metrics_row(run: Run, step: int, metrics: StepMetrics, lr_scale: float) -> dict[str, Any]:
    """A row but for timings: means over the processes; codes of the batch that the prior saw (a local one: process 0's share)."""
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
        "lr": run.config.optimizer.lr * lr_scale,
        "grad_norm": None if metrics.grad_norm is None else float(metrics.grad_norm),
        "probe_train_accuracy": accuracy[0] if accuracy else None,
    }
