"""Measure where the time of real training steps goes.

The steps are those of `training_step`, watched by hooks. A phase ends where the next one begins.

    data            waiting for the loader's batch, including its copy to the device
    photometric     colours, blur and normalisation on the device; before them the crops of resident images
    forward         the network: backbone and projector
    loss            the loss, forward; the C++ and Triton losses compute their gradient here
    backward        the probe, the gradient, and what happens to it before the optimizer (its norm, clipping, unscaling)
    communication   DDP only: the time that averaging the gradients adds to a step, found by leaving it out of every other step.
                    All-reduces of synchronised BatchNorm and of the prior stay in forward, loss and backward, and so do FSDP2's
                    collectives
    optimizer       the update, and the average of the weights

On a GPU the time stamps are CUDA events, and nothing waits for them before the last step: a phase is the time between two events
on the device, idle time included. Phases that a compiler or a CUDA graph has merged cannot be told apart and are one phase.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from falcon_fast.hardware.peaks import synchronize
from falcon_fast.training.distributed.parallel import gradient_sync
from falcon_fast.training.inputs import Feed
from falcon_fast.training.run import Run
from falcon_fast.training.step import Learner, training_step
from falcon_fast.training.stepper import stepper

WARM_UP = 5  # steps; compilation ends with the second step, and the loader's queue has filled by the fifth
EXTRA = 10  # steps of each kind, to find the time of the host and of communication
TRACED = 3
PHASES = ("data", "photometric", "forward", "loss", "backward", "communication", "optimizer")


class Watch:
    """Time stamps at the borders of phases, over several steps.

    recording: also name the phases in torch's profiler, for a trace.
    """

    def __init__(self, device: torch.device, recording: bool = False) -> None:
        self._device, self._gpu, self._recording = device, device.type == "cuda", recording
        self._steps: list[list[tuple[str, Any]]] = []
        self._phase = ""
        self._range: Any = None
        self._origin: Any = None

    def enter(self, phase: str) -> None:
        """Begin a phase and end the one before it. Do nothing inside a compiled or captured part."""
        if torch.compiler.is_compiling() or (self._gpu and torch.cuda.is_current_stream_capturing()):
            return
        stamp = self._stamp()
        if self._origin is None:
            self._origin = stamp
        else:
            self._steps[-1].append((self._phase, stamp))
        self._phase = phase
        if self._recording:
            self.stop()
            self._range = torch.profiler.record_function(phase)
            self._range.__enter__()

    def step(self) -> None:
        """Begin a step, with the wait for its data."""
        self.enter("data")
        self._steps.append([])

    def stop(self) -> None:
        """End the profiler's range of the last phase."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None

    def _stamp(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> list[dict[str, float]]:
        """Return the seconds of each phase, for each finished step. On a GPU the last event must have completed."""
        found, before = [], self._origin
        for step in self._steps:
            phases: dict[str, float] = {}
            for phase, stamp in step:
                spent = before.elapsed_time(stamp) / 1e3 if self._gpu else stamp - before
                phases[phase] = phases.get(phase, 0.0) + spent
                before = stamp
            if phases:
                found.append(phases)
        return found


@contextmanager
def watched(learner: Learner, watch: Watch) -> Iterator[None]:
    """Inside the context, training steps of `learner` stamp forward (for each micro-batch), loss, backward and optimizer."""
    hooks = [
        learner.network.register_forward_pre_hook(lambda *_: watch.enter("forward")),
        learner.criterion.register_forward_pre_hook(lambda *_: watch.enter("loss")),
        learner.criterion.register_forward_hook(lambda *_: watch.enter("backward")),
        learner.optimizer.register_step_pre_hook(lambda *_: watch.enter("optimizer")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Timings(NamedTuple):
    """Measured times, in seconds, and memory.

    Attributes:
        steps: the time of each step.
        phases: the mean time of each phase over the middle steps, whose times lie between the 20th and the 80th percentile.
        step: the mean time of the middle steps.
        host: the median time in which the host issues a step's work without waiting for it; None on a CPU.
        memory: bytes at the peak: allocated memory on a GPU, the memory of the whole process on a CPU.
    """

    steps: list[float]
    phases: dict[str, float]
    step: float
    host: float | None
    memory: int


class Steps:
    """Training steps of a run, whose result is not kept. All use the peak learning rate, which does not change their time."""

    def __init__(self, run: Run, feed: Feed) -> None:
        self._run, self._feed = run, feed
        graph = run.config.training.cuda_graph
        self._graphed = stepper(run.learner, feed.views_of, run.device, True) if graph else None

    def take(self, watch: Watch | None = None, synchronised: bool = True) -> float:
        """Take one step; return the host's seconds from the arrival of the data on.

        synchronised: average the gradients over the processes.
        """
        enter = watch.enter if watch else lambda phase: None
        if watch:
            watch.step()
        inputs = next(self._feed.inputs)
        started = time.perf_counter()
        enter("photometric")
        if self._graphed is not None:
            self._graphed(inputs, 1.0, True)
            return time.perf_counter() - started
        views, labels = self._feed.views_of(inputs)
        enter("forward")
        learner = self._run.learner
        with ExitStack() as stack:
            if not synchronised:
                stack.enter_context(gradient_sync((learner.network, learner.probe), False))
            training_step(learner, views, labels, 1.0)
        return time.perf_counter() - started


def needed(run: Run, count: int) -> int:
    """Return the number of steps that `measure` and `trace` take together."""
    return WARM_UP + count + 3 * EXTRA + TRACED


def measure(run: Run, steps: Steps, count: int) -> Timings:
    """Time `count` steps after the warm-up. All processes call this together, and each gets its own times."""
    device, watch = run.device, Watch(run.device)
    for _ in range(WARM_UP):
        steps.take()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with watched(run.learner, watch):
        for _ in range(count):
            steps.take(watch)
        watch.step()
    synchronize(device)
    each = watch.seconds()
    totals = [sum(phases.values()) for phases in each]
    middle = _middle(each, totals)
    phases = {name: statistics.fmean(step.get(name, 0.0) for step in middle) for name in PHASES}
    phases = _told_apart({name: seconds for name, seconds in phases.items() if any(name in step for step in middle)})
    communication = _communication(run, steps)
    if communication is not None and "backward" in phases:
        phases["communication"] = min(max(0.0, communication), phases["backward"])
        phases["backward"] -= phases["communication"]
        phases = {name: phases[name] for name in sorted(phases, key=_place)}
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident()
    mean = statistics.fmean(sum(step.values()) for step in middle)
    return Timings(totals, phases, mean, _host(run, steps), memory)


def _middle(steps: list[dict[str, float]], totals: list[float]) -> list[dict[str, float]]:
    low, high = spread(totals)
    return [step for step, total in zip(steps, totals, strict=True) if low <= total <= high]


def spread(values: list[float]) -> tuple[float, float]:
    """Return the 20th and the 80th percentile; both are members of `values`."""
    ordered = sorted(values)
    return ordered[int(0.2 * (len(ordered) - 1))], ordered[-1 - int(0.2 * (len(ordered) - 1))]


def _place(name: str) -> int:
    return PHASES.index(name.split(",")[0].split(" ")[0])


def _told_apart(phases: dict[str, float]) -> dict[str, float]:
    """Rename phases that cover more than one: if the next phase did not begin, a phase lasts until the next stamp."""
    if "loss" in phases:
        return phases
    if "forward" not in phases:  # a CUDA graph
        name = "photometric, forward, loss, backward, optimizer"
        return {name if phase == "photometric" else phase: seconds for phase, seconds in phases.items()}
    name = "forward, loss, backward" if "optimizer" in phases else "forward, loss, backward, optimizer"
    return {name if phase == "forward" else phase: seconds for phase, seconds in phases.items()}


def _host(run: Run, steps: Steps) -> float | None:
    if run.device.type != "cuda":
        return None
    found = []
    for _ in range(EXTRA):
        synchronize(run.device)  # with an empty queue, issuing work does not wait for earlier work
        found.append(steps.take())
    synchronize(run.device)
    return statistics.median(found)


def _communication(run: Run, steps: Steps) -> float | None:
    """Return the seconds that averaging the gradients adds to a step; None for one process and for FSDP2, which needs it."""
    if run.processes.group is None or run.sharded:
        return None
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * EXTRA):
        synchronised = number % 2 == 0
        synchronize(run.device)
        started = time.perf_counter()
        steps.take(synchronised=synchronised)
        synchronize(run.device)
        found[synchronised].append(time.perf_counter() - started)
    return statistics.median(found[True]) - statistics.median(found[False])


def _resident() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def trace(run: Run, steps: Steps, write: Callable[[torch.profiler.profile], None]) -> None:
    """Take three more steps under torch's profiler, with named phases, and pass the profiler to `write`.

    All processes call this together.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    watch = Watch(run.device, recording=True)
    with torch.profiler.profile(activities=activities) as profiler, watched(run.learner, watch):
        for _ in range(TRACED):
            steps.take(watch)
        watch.stop()
        synchronize(run.device)
    write(profiler)
