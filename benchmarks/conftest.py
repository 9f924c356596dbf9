"""How benchmarks measure: interleaved runs and their medians, the peak of memory, one table and one JSON file a module."""

from __future__ import annotations

import ctypes
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import torch

from falcon_fast.hardware.devices import cpu_name
from falcon_fast.kernels import cpu_extension

RESULTS = Path(__file__).parent / "results"


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each function, one after the other in every round, so that all see the same machine.

    Each runs twice and the second is timed: the first pays for returning its predecessor's memory to the system (8 ms of a step
    of 7 ms after one of eager's) and for its own first touch of new pages, as a training step does not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def extra_peak_memory(function: Callable[[], object]) -> int | None:
    """Bytes of resident memory that `function` adds at its peak, its freed scratch included; None where Linux does not tell.

    Run it once before: what the extension then keeps for the thread's next call is counted as well.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is resident
        before = _status("VmHWM")
        function()
        return _status("VmHWM") - before + (cpu_extension.scratch_kept() if cpu_extension is not None else 0)
    except OSError:
        return None


def milliseconds(function: Callable[[], object]) -> float:
    """One call, by the clock of the GPU if there is one, else the host's."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_bytes(function: Callable[[], object]) -> int | None:
    """What one call adds to the memory of the GPU if there is one, else to resident memory, at its peak."""
    if not torch.cuda.is_available():
        return extra_peak_memory(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def as_graph(function: Callable[[], object]) -> Callable[[], object]:
    """`function` captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


class Table:
    """Rows of one benchmark file, printed when it is done; written as JSON with --benchmark-write as they come, so that what was
    measured before an interruption stays."""

    def __init__(self, machine: dict[str, object], path: Path | None) -> None:
        self.machine, self.path = machine, path
        self.rows: list[dict[str, object]] = []

    def add(self, **row: object) -> None:
        self.rows.append(row)
        if self.path is not None:
            self.path.write_text(json.dumps(self.machine | {"rows": self.rows}, indent=1) + "\n")

    def lines(self) -> Iterator[str]:
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        cells = [[self._text(row.get(column)) for column in columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in (columns, *cells):
            yield "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()

    @staticmethod
    def _text(value: object) -> str:
        return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _output(*command: str) -> str | None:
    """What a command prints, in one line; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _machine() -> dict[str, object]:
    machine: dict[str, object] = {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=12"),
    }
    if torch.cuda.is_available():
        machine |= {
            "gpu": torch.cuda.get_device_name(),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
            "triton": metadata.version("triton"),
        }
    return machine


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    path = None
    if request.config.getoption("--benchmark-write"):
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{Path(request.path).stem}.json"
    table = Table(_machine(), path)
    yield table
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + ", ".join(f"{key} {value}" for key, value in table.machine.items()))
        print("\n".join(table.lines()))
