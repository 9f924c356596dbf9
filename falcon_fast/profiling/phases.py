"""Where the time of real training steps goes.

The steps are `training_step`'s own, watched by hooks: what a phase is called ends where the next begins.

    data            waiting for the loader's batch, its copy to the device included
    photometric     colours, blur, normalisation, on the device; before them the crops of resident images
    forward         the network: backbone and projector
    loss            forward; the C++ and Triton losses form their gradient here
    backward        the probe, the gradient, and what is done with it before the optimiser (its norm, clipping, unscaling)
    communication   of DDP: what averaging the gradients adds to a step, found by leaving it out of every other step. All-reduces
                    of synchronised BatchNorm and of the prior stay in forward, loss and backward, FSDP2's collectives likewise
    optimizer       the update, and the average of the weights

On a GPU the stamps are CUDA events, and nothing waits for them before the last step: a phase then is the time between two events
on the device, idle or not. What a compiler or a CUDA graph has made one of cannot be told apart, and is one phase.
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

WARM_UP = 5  # steps; compilation ends with the second, the loader's queue is by then as full as it will be
EXTRA = 10  # steps of a kind, for the time of the host and of communication
TRACED = 3
PHASES = ("data", "photometric", "forward", "loss", "backward", "communication", "optimizer")


class Watch:
    """Stamps at the borders of phases, in a step as in the one before.

    recording: also name the phases to torch's profiler, for a trace.
    """

    def __init__(self, device: torch.device, recording: bool = False) -> None:
        self._device, self._gpu, self._recording = device, device.type == "cuda", recording
        self._steps: list[list[tuple[str, Any]]] = []
        self._phase = ""
        self._range: Any = None
        self._origin: Any = None

    def enter(self, phase: str) -> None:
        """A phase begins here, and the one before it ends. Inside a compiled or captured part: nothing."""
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
        """A step begins, with the wait for its data."""
        self.enter("data")
        self._steps.append([])

    def stop(self) -> None:
        """Nothing follows that would belong to a phase."""
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
        """Of each step that is over: its phases' seconds. On a GPU the last event must have happened."""
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
    """Inside, training steps of `learner` stamp forward (again, for a micro-batch), loss, backward and optimizer."""
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
    """Seconds. What each step took; the mean of the phases over the middle steps (20th to 80th percentile), and of these steps.

    Attributes:
        host: median of what the host takes to issue a step's work, without waiting for it; None on a CPU, which does it itself.
        memory: bytes at the peak: allocated on a GPU; on a CPU of the whole process.
    """

    steps: list[float]
    phases: dict[str, float]
    step: float
    host: float | None
    memory: int


class Steps:
    """The steps of a run that nobody keeps: one after the other, at the peak learning rate, which does not change their time."""

    def __init__(self, run: Run, feed: Feed) -> None:
        self._run, self._feed = run, feed
        graph = run.config.training.cuda_graph
        self._graphed = stepper(run.learner, feed.views_of, run.device, True) if graph else None

    def take(self, watch: Watch | None = None, synchronised: bool = True) -> float:
        """One step; `synchronised`: with the gradients averaged over the processes. Returns the host's seconds after the data."""
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
    """Steps that `measure` and `trace` take in all."""
    return WARM_UP + count + 3 * EXTRA + TRACED


def measure(run: Run, steps: Steps, count: int) -> Timings:
    """Time `count` steps, after some that warm up. All processes together; each has its own times."""
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
    """20th and 80th percentile, of the values themselves."""
    ordered = sorted(values)
    return ordered[int(0.2 * (len(ordered) - 1))], ordered[-1 - int(0.2 * (len(ordered) - 1))]


def _place(name: str) -> int:
    return PHASES.index(name.split(",")[0].split(" ")[0])


def _told_apart(phases: dict[str, float]) -> dict[str, float]:
    """Named for what it is: a phase after which no next one began holds that, and all up to the next stamp."""
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
        synchronize(run.device)  # an empty queue: what is issued then is not held up by what came before
        found.append(steps.take())
    synchronize(run.device)
    return statistics.median(found)


def _communication(run: Run, steps: Steps) -> float | None:
    """Seconds that averaging the gradients adds to a step; None for one process and for FSDP2, which cannot do without."""
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
    """Three more steps under torch's profiler, their phases named, which `write` then gets. For one of the processes, or all."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    watch = Watch(run.device, recording=True)
    with torch.profiler.profile(activities=activities) as profiler, watched(run.learner, watch):
        for _ in range(TRACED):
            steps.take(watch)
        watch.stop()
        synchronize(run.device)
    write(profiler)
