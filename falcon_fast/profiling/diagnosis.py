"""What limits a run's steps, in a sentence, from where their time went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from falcon_fast.profiling.roofline import Bound

WAITING = 0.2  # of a step: below that, doing away with it altogether gains less than a quarter
ISSUING = 0.9  # of a step that the host takes to issue it: the device then waits for the host
# Of the network's time, what its operators need at the device's rates: below that, neither rate is what limits. Convolutions
# alone reach about half of a matrix product's.
BUSY = 0.5


class Circumstances(NamedTuple):
    """What the advice depends on.

    network: seconds of a step in the network, forward and backward; None where they cannot be told from the loss.
    host: seconds in which the host issues a step; None on a CPU.
    bound: the network's operators at the device's rates; None where they could not be counted.
    """

    gpu: bool
    processes: int
    compiled: bool
    autocast: bool
    network: float | None
    host: float | None
    bound: Bound | None


class Diagnosis(NamedTuple):
    """limit: data, communication, launch, overhead, memory or compute."""

    limit: str
    sentence: str


def diagnose(phases: Mapping[str, float], images: int, facts: Circumstances) -> Diagnosis:
    """phases: seconds of a step by name, as `training.phases` has them; images: of a step, over all processes."""
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
            f"launches: the host takes {1e3 * facts.host:.1f} of {1e3 * step:.1f} ms to issue a step, and the GPU waits for it: "
            f"{how}",
        )
    return _working(phases, step, facts)


def _waiting(name: str, share: float, without: float | None) -> Diagnosis:
    most = "" if without is None else f"; without that wait the same steps would make {without:,.0f} images/s"
    if name == "data":
        return Diagnosis(
            name,
            f"data: {share:.0%} of a step is spent waiting for the loader{most}: more data.workers, another --loader, or smaller "
            "files (falcon-fast data pack)",
        )
    return Diagnosis(
        name,
        f"communication: averaging the gradients adds {share:.0%} of a step{most}: a larger batch a process, or --accumulate, "
        "which averages once for several micro-batches",
    )


def _working(phases: Mapping[str, float], step: float, facts: Circumstances) -> Diagnosis:
    device, bound, network = "GPU" if facts.gpu else "CPU", facts.bound, facts.network
    loss = phases.get("loss", 0.0)
    also = f"; the loss takes {loss / step:.0%} of a step" if loss >= 0.3 * step else ""
    if bound is None or not network:
        unknown = "compute or memory bandwidth, which cannot be told apart here"
        return Diagnosis("compute", f"{unknown}: the {device} waits for nothing{also}")
    ideal = bound.compute + bound.memory
    if ideal < BUSY * network:
        how = "" if facts.compiled else "--compile puts operators together, "
        collectives = ", all-reduces inside the network" if facts.processes > 1 else ""
        return Diagnosis(
            "overhead",
            f"overhead: at the {device}'s measured rates arithmetic and memory traffic would need {ideal / network:.0%} of the "
            f"network's time, the rest goes into calling small operators{collectives} and kernels that fall short: {how}a larger "
            f"batch makes them larger{also}",
        )
    if bound.memory > bound.compute:
        wider = [] if facts.autocast else ["--amp halves the bytes"]
        wider += [] if facts.compiled else ["--compile saves passes over memory"]
        how = f": {', '.join(wider)}" if wider else ""
        return Diagnosis(
            "memory",
            f"memory bandwidth: operators bound by their bytes need {bound.memory / network:.0%} of the network's time at the "
            f"measured bandwidth, those bound by arithmetic {bound.compute / network:.0%}{how}{also}",
        )
    how = ": --amp multiplies faster" if facts.gpu and not facts.autocast else ""
    return Diagnosis(
        "compute",
        f"compute: matrix products and convolutions need {bound.compute / network:.0%} of the network's time at the rate "
        f"measured here, memory traffic {bound.memory / network:.0%}{how}{also}",
    )
