"""Time a run's steps on this machine and explain them: throughput, phases, memory, utilisation, and what limits the steps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from falcon_fast.errors import UsageError
from falcon_fast.files import written_whole
from falcon_fast.hardware import peaks
from falcon_fast.hardware.devices import cpu_name
from falcon_fast.hardware.flops import StepFlops, step_flops
from falcon_fast.models.batchnorm import per_view_batchnorm
from falcon_fast.models.network import build_network
from falcon_fast.profiling import phases
from falcon_fast.profiling.diagnosis import Circumstances, Diagnosis, diagnose
from falcon_fast.profiling.roofline import Bound, Rates, trace
from falcon_fast.training.compiled import compiler_failures
from falcon_fast.training.distributed.stopping import lost_peers
from falcon_fast.training.inputs import feed_of, photometric_of, quarantine_of
from falcon_fast.training.memory import images_at_once, out_of_memory
from falcon_fast.training.run import Run, seed_process


@dataclass(frozen=True)
class Profile:
    """The result of a profile, in seconds, bytes, FLOP and FLOP/s.

    Attributes:
        images: images per step, over all processes.
        timings: this process's steps and phases.
        flop: FLOP of a step, over all processes; None if they cannot be counted.
        sheet: FLOP/s of one device by its data sheet; None if the device is not known.
        measured: the rates that one device reached here.
    """

    images: int
    processes: int
    device: str
    timings: phases.Timings
    flop: StepFlops | None
    sheet: float | None
    measured: peaks.Measured
    diagnosis: Diagnosis

    def _share(self, peak: float | None) -> float | None:
        if self.flop is None or peak is None:
            return None
        return self.flop.total / statistics.median(self.timings.steps) / (peak * self.processes)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation: the share of the data sheet's peak if it is known, else of the measured rate."""
        return self._share(self.sheet or self.measured.rate)

    @property
    def mfu_of_measured(self) -> float | None:
        """Model FLOP utilisation as a share of the rate that a matrix product reached here."""
        return self._share(self.measured.rate)

    @property
    def images_per_second(self) -> tuple[float, float, float]:
        """Images/s of the median step, then the 20th and the 80th percentile of images/s."""
        fast, slow = phases.spread(self.timings.steps)
        median = statistics.median(self.timings.steps)
        return self.images / median, self.images / slow, self.images / fast

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name, for JSON."""
        median, low, high = self.images_per_second
        timings, measured = self.timings, self.measured
        return {
            "images_per_step": self.images,
            "processes": self.processes,
            "device": self.device,
            "steps": len(timings.steps),
            "images_per_second": {"median": median, "p20": low, "p80": high},
            "step_seconds": timings.step,
            "phase_seconds": timings.phases,
            "host_seconds": timings.host,
            "data_wait": timings.phases["data"] / timings.step,
            "peak_memory_bytes": timings.memory,
            "flop_per_step": None if self.flop is None else {**self.flop._asdict(), "total": self.flop.total},
            "mfu": self.mfu,
            "mfu_of_measured": self.mfu_of_measured,
            "peak_flop_per_second": {"data_sheet": self.sheet, "measured": measured.rate},
            "measured_product": {"side": measured.side, "dtype": str(measured.dtype).removeprefix("torch.")},
            "measured_bandwidth_bytes_per_second": measured.bandwidth,
            "limit": self.diagnosis.limit,
            "diagnosis": self.diagnosis.sentence,
        }


def profile(run: Run, count: int, say: Callable[[str], None], trace_file: Path | None = None) -> Profile:
    """Take training steps of `run` as `train` would, and time `count` of them; nothing is kept. All processes call this together.

    trace_file: the file to which process 0 writes three steps of torch's profiler as a Chrome trace.

    Raises:
        UsageError: the data are bad, the network cannot be compiled, or the trace cannot be written.
        TrainingError: there is not enough memory, or another process has ended.
    """
    if trace_file is not None:
        with run.processes.together():
            if run.processes.main:
                _check_writable(trace_file)
    needed = range(phases.needed(run, count))
    feed = feed_of(run, needed, quarantine_of(run, say), photometric_of(run, say))
    seed_process(run, 0)
    run.network.train()
    with (
        compiler_failures(),
        out_of_memory(run),
        run.precision.switches(),
        lost_peers(run.processes, lambda: "nothing was measured"),
        closing(feed.inputs),
    ):
        steps = phases.Steps(run, feed)
        timings = phases.measure(run, steps, count)
        if trace_file is not None:
            phases.trace(run, steps, lambda found: _write(found, trace_file) if run.processes.main else None)
    with run.processes.together():  # the other processes wait: on a CPU they would compete
        measured = peaks.measure(run.device, run.precision) if run.processes.main else None
    measured = run.processes.from_main(measured)
    assert measured is not None
    flop, bound = _counted(run, measured, say) if run.processes.main else (None, None)
    facts = Circumstances(
        gpu=run.device.type == "cuda",
        processes=run.processes.world_size,
        compiled=run.config.training.compile,
        autocast=run.amp_dtype is not None,
        network=_network(timings.phases),
        host=timings.host,
        bound=bound,
    )
    images = run.config.training.batch_size
    return Profile(
        images=images,
        processes=run.processes.world_size,
        device=torch.cuda.get_device_name(run.device) if facts.gpu else cpu_name(),
        timings=timings,
        flop=flop,
        sheet=peaks.known_rate(run.device, run.precision),
        measured=measured,
        diagnosis=diagnose(timings.phases, images, facts),
    )


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _check_writable(path: Path) -> None:
    try:
        _partial(path).touch()
        _partial(path).unlink()
    except OSError as error:
        raise UsageError(f"the trace {path} cannot be written: {error.strerror}") from None


def _write(found: torch.profiler.profile, path: Path) -> None:
    with written_whole(path) as partial:
        found.export_chrome_trace(str(partial))


def _network(found: dict[str, float]) -> float | None:
    """Return the seconds of forward and backward; None if they are not told apart from the loss."""
    return found["forward"] + found["backward"] if "loss" in found else None


def _counted(run: Run, measured: peaks.Measured, say: Callable[[str], None]) -> tuple[StepFlops | None, Bound | None]:
    """Return the FLOP of a step, and the seconds that this process's network needs at the measured rates."""
    try:
        network = per_view_batchnorm(build_network(run.config, run.source.size))
        flop = step_flops(run.config, network, run.source.size)
        traced = trace(network, 2 * images_at_once(run), run.source.size, run.amp_dtype)
    except Exception as error:  # anything that an operator raises because its tensors hold no numbers
        say(f"the FLOP of {run.config.model.name} cannot be counted ({str(error).splitlines()[0][:200]}): no MFU")
        return None, None
    rates = Rates(*(measured.rate,) * 4, measured.bandwidth, launch=0.0)
    bound = rates.total(traced.operators)
    return flop, Bound(*(run.config.training.accumulate * seconds for seconds in bound))


def lines(run: Run, found: Profile) -> Iterator[str]:
    """Yield the lines that are printed below the table of phases."""
    median, low, high = found.images_per_second
    timings, measured = found.timings, found.measured
    memory = f"{timings.memory / 2**30:.2f} GiB" + ("" if run.device.type == "cuda" else " (of the process)")
    yield (
        f"{median:,.0f} images/s (median of {len(timings.steps)} steps; 20th to 80th percentile {low:,.0f} to {high:,.0f}), "
        f"{1e3 * timings.step:.2f} ms a step; peak memory {memory}"
    )
    if found.flop is not None and found.mfu is not None and found.mfu_of_measured is not None:
        product = f"a matrix product ({measured.side}^3, {str(measured.dtype).removeprefix('torch.')})"
        sheet = (
            "" if found.sheet is None else f"{found.mfu:.1%} of the data sheet's {found.sheet / 1e12:,.0f} TFLOP/s, "
        )
        each = " of each device" if found.processes > 1 else ""
        yield (
            f"{_flop(found.flop.total)} a step (network {_flop(found.flop.network)}, loss {_flop(found.flop.loss)}): MFU {sheet}"
            f"{found.mfu_of_measured:.1%} of the {measured.rate / 1e12:,.2f} TFLOP/s{each} that {product} reached here"
        )
    yield f"limited by {found.diagnosis.sentence}"


def _flop(number: float) -> str:
    return f"{number / 1e12:,.2f} TFLOP" if number >= 1e12 else f"{number / 1e9:,.2f} GFLOP"
