"""Tools of the benchmarks: interleaved runs and their medians, peak memory, a table and a JSON file for each module."""

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
    """Return the median seconds of each function; every round runs all of them in turn, so that all see the same machine.

    Each function runs twice, and the second run is timed. The first one pays for returning its predecessor's memory to the system
    (8 ms for a step of 7 ms after an eager step) and for touching new pages for the first time, as no training step does.
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
    """Return the bytes of resident memory that `function` adds at its peak, including scratch memory that it frees.

    None if the system does not provide this number. Call `function` once before: the scratch memory that the extension keeps for
    the thread's next call is counted, too.
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
    """Return the milliseconds of one call, by the GPU's clock if there is a GPU, else by the host's."""
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
    """Return the bytes that one call adds at its peak to the GPU's memory if there is a GPU, else to resident memory."""
    if not torch.cuda.is_available():
        return extra_peak_memory(function)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def as_graph(function: Callable[[], object]) -> Callable[[], object]:
    """Capture `function` as a CUDA graph and return a function that replays it."""
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
    """The rows of one benchmark file, printed when it is done.

    With --benchmark-write each row is written as JSON at once, so that an interruption loses nothing.
    """

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
    """Return the output of a command; None if the command does not exist or fails."""
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
