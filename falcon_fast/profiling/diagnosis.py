"""Say in one sentence what limits a run's steps, judged by where their time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from falcon_fast.profiling.roofline import Bound

WAITING = 0.2  # of a step; if less is spent waiting, removing the wait completely gains less than a quarter
ISSUING = 0.9  # of a step; if the host takes longer to issue the step, the device waits for the host
# The share of the network's time that its operators need at the device's rates; if it is lower, neither arithmetic nor bandwidth
# is the limit. Convolutions alone reach about half of the rate of a matrix product.
BUSY = 0.5


class Circumstances(NamedTuple):
    """The facts that the advice depends on, besides the phases.

    network: seconds of a step in the network, forward and backward; None if they cannot be told apart from the loss.
    host: seconds that the host needs to issue a step; None on a CPU.
    bound: the time of the network's operators at the device's rates; None if they could not be counted.
    """

    gpu: bool
    processes: int
    compiled: bool
    autocast: bool
    network: float | None
    host: float | None
    bound: Bound | None


class Diagnosis(NamedTuple):
    """limit: `data`, `communication`, `launch`, `overhead`, `memory` or `compute`; sentence: one line for the user."""

    limit: str
    sentence: str


def diagnose(phases: Mapping[str, float], images: int, facts: Circumstances) -> Diagnosis:
    """Return what limits the steps.

    phases: seconds of a step by phase, as in `profiling.phases`; images: images per step, over all processes.
    """
    step = sum(phases.values())
    waits = {name: phases.get(name, 0.0) for name in ("data", "communication")}
    largest = max(waits, key=lambda name: waits[name])
    if waits[largest] >= WAITING * step:
        return _waiting(
            largest, waits[largest] / step, images / (step - waits[largest]) if step > waits[largest] else None
        )
    if facts.host is not None and facts.host >= ISSUING * step:
        ways = ["--cuda-graph"] if facts.processes == 1 else []
        ways += [] if facts.compiled else ["--compile"]
        how = " or ".join([*ways, "a larger batch"])
        return Diagnosis(
            "launch",
            f"launches: the host needs {1e3 * facts.host:.1f} of {1e3 * step:.1f} ms to issue a step, and the GPU waits for the "
            f"host: use {how}",
        )
    return _working(phases, step, facts)


def _waiting(name: str, share: float, without: float | None) -> Diagnosis:
    most = "" if without is None else f"; without this wait the same steps would reach {without:,.0f} images/s"
    if name == "data":
        return Diagnosis(
            name,
            f"data: {share:.0%} of a step is spent waiting for the loader{most}: use more workers (data.workers), another "
            "--loader, or smaller files (falcon-fast data pack)",
        )
    return Diagnosis(
        name,
        f"communication: averaging the gradients takes {share:.0%} of a step{most}: use a larger batch per process, or "
        "--accumulate, which averages once for several micro-batches",
    )


def _working(phases: Mapping[str, float], step: float, facts: Circumstances) -> Diagnosis:
    device, bound, network = "GPU" if facts.gpu else "CPU", facts.bound, facts.network
    loss = phases.get("loss", 0.0)
    also = f"; the loss takes {loss / step:.0%} of a step" if loss >= 0.3 * step else ""
    if bound is None or not network:
        unknown = "compute or memory bandwidth, which cannot be told apart here"
        return Diagnosis("compute", f"{unknown}: the {device} rarely waits{also}")
    ideal = bound.compute + bound.memory
    if ideal < BUSY * network:
        how = "" if facts.compiled else "--compile fuses operators, "
        collectives = ", all-reduces inside the network" if facts.processes > 1 else ""
        return Diagnosis(
            "overhead",
            f"overhead: at the {device}'s measured rates, arithmetic and memory traffic would need only {ideal / network:.0%} of "
            f"the network's time; the rest is spent on calls of small operators{collectives} and on kernels that do not reach "
            f"these rates: {how}a larger batch makes the operators larger{also}",
        )
    if bound.memory > bound.compute:
        wider = [] if facts.autocast else ["--amp halves the bytes"]
        wider += [] if facts.compiled else ["--compile avoids passes over memory"]
        how = f": {', '.join(wider)}" if wider else ""
        return Diagnosis(
            "memory",
            f"memory bandwidth: at the measured rates, operators limited by memory traffic need {bound.memory / network:.0%} of "
            f"the network's time, and operators limited by arithmetic {bound.compute / network:.0%}{how}{also}",
        )
    how = ": --amp makes products faster" if facts.gpu and not facts.autocast else ""
    return Diagnosis(
        "compute",
        f"compute: at the measured rates, matrix products and convolutions need {bound.compute / network:.0%} of the network's "
        f"time, and memory traffic {bound.memory / network:.0%}{how}{also}",
    )
