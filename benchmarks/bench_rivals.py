"""The loss and its rivals, forward and backward, in one run: on a GPU with the shapes of large dictionaries, else on the CPU.

Run it with `pytest --benchmark benchmarks/bench_rivals.py`. All rivals of a shape are timed in turn, round after round. `of the
floor` is the time of the dense floor divided by the rival's time; the floor is 8 N f c FLOP at the rate that torch's own product
reaches on this machine (fp16 on a GPU, float32 on a CPU). The error is that of the gradient, relative to the three sweeps in
float64.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import pytest
import torch

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss, temperature

from . import rivals
from .bench_loss import embeddings
from .conftest import as_graph, milliseconds, peak_bytes

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
SHAPES = (
    [(64, 2048, 16384), (256, 2048, 16384), (1024, 2048, 65536), (1024, 512, 524288), (1024, 2048, 524288)]
    if ON_GPU
    else [(64, 512, 8192)]
)
ROUNDS = 20 if ON_GPU else 5
CHUNK = 8192 if ON_GPU else 2048
LARGEST_EXACT = 2**30  # largest N c for which the float64 sweeps run, for the error
IMPLEMENTATION = "triton" if ON_GPU else "cpu"


@pytest.fixture(scope="module")
def product_rate() -> float:
    """FLOP/s of torch's own product on this machine: fp16 (8192^3) on a GPU, float32 (2048^3) on a CPU."""
    size, dtype = (8192, torch.float16) if ON_GPU else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2e3 * size**3 / statistics.median(milliseconds(lambda: a @ b) for _ in range(ROUNDS))


@pytest.mark.parametrize(("n", "f", "c"), SHAPES, ids=str)
def test_rivals(table, product_rate, n, f, c) -> None:
    tau = temperature(f, c, max(1, f // 32))  # logits that spread by about 2, whatever f
    h1, h2 = (h.detach().to(DEVICE).requires_grad_() for h in embeddings(n, f))
    autocast = torch.float16 if ON_GPU else None
    exact: dict[type, torch.Tensor] = {}

    def ours(codes, **options) -> Callable[[], object]:
        def run():
            out = falcon_loss(h1, h2, codes, tau, implementation=IMPLEMENTATION, **options)
            return out.loss.detach(), *torch.autograd.grad(out.loss, (h1, h2))

        return run

    for kind in (RademacherCodes, HadamardCodes):
        codes = kind(f, c).to(DEVICE)
        if n * c <= LARGEST_EXACT:
            wide = (h.detach().double() for h in (h1, h2))
            _, *gradients = rivals.chunked(4096, compiled=False, half=False)(*wide, codes.dense(torch.float64), tau)
            exact[kind] = torch.cat(gradients)
        candidates: dict[str, Callable[[], object]] = {}
        if kind is RademacherCodes:
            w = codes.dense().contiguous()
            for name, function in {
                "published": rivals.with_gradient(rivals.published_loss, autocast),
                "published, compiled": rivals.with_gradient(
                    torch.compile(rivals.published_loss, dynamic=False), autocast
                ),
                "eager": rivals.with_gradient(rivals.eager_loss, autocast),
                "eager, compiled": rivals.with_gradient(torch.compile(rivals.eager_loss, dynamic=False), autocast),
                "chunks, compiled": rivals.chunked(CHUNK, compiled=True, half=ON_GPU),
            }.items():
                candidates[name] = functools.partial(function, h1, h2, w, tau)
            candidates["ours, stored"] = ours(codes, plan="stored")
            candidates["ours, streaming"] = ours(codes, plan="streaming")
        else:
            candidates["ours, hadamard"] = ours(codes)
        if ON_GPU and n * c <= 2**22:
            for name in list(candidates):  # rivals too: a graph saves their launches as it saves ours
                candidates[f"{name}, CUDA graph"] = as_graph(candidates[name])
        measure(table, candidates, exact.get(kind), (n, f, c), product_rate)


def measure(table, candidates, exact, shape, product_rate) -> None:
    """Add a row to the table for each candidate; the row says so if a candidate does not fit into the memory."""
    n, f, c = shape
    rows, running = {}, {}
    for name, function in candidates.items():
        try:
            for _ in range(2):
                result = function()
            memory = peak_bytes(function)
        except torch.cuda.OutOfMemoryError:
            rows[name] = {"note": "does not fit into the memory"}
            torch.cuda.empty_cache()
            continue
        error = None
        if exact is not None and isinstance(result, tuple):
            error = ((torch.cat(result[1:]) - exact).norm() / exact.norm()).item()
        rows[name] = {"peak MiB": None if memory is None else memory / 2**20, "gradient error": error}
        running[name] = function
        del result
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(ROUNDS):
        for name, function in running.items():
            function()  # restores its memory and caches
            times[name].append(milliseconds(function))
    for name, row in rows.items():
        figures = {}
        if name in times:
            low, middle, high = (statistics.quantiles(times[name], n=10)[i] for i in (1, 4, 7))
            flop = 8.0 * n * f * c
            figures = {
                "ms": middle,
                "p20": low,
                "p80": high,
                "TFLOP/s": flop / middle / 1e9,
                "of the floor": flop / product_rate / (middle / 1e3),
            }
        table.add(shape=f"({n}, {f}, {c})", what=name, **figures, **row)
