"""The loss on the CPU, forward and backward: ours, and plain eager float32 on an unpacked dictionary, in one run.

Run it with `pytest --benchmark benchmarks/bench_loss.py`. `times faster` compares medians of interleaved runs. Memory is what a
step adds to the resident size at its peak. The error is that of the gradient, relative to the float64 reference.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from falcon_fast import HadamardCodes, RademacherCodes, falcon_loss, temperature
from falcon_fast.kernels import pack_signs
from falcon_fast.objective.reference import reference_loss

from .conftest import extra_peak_memory, interleaved

# kind, N, f, c, plan, rounds, with eager
ROWS = [
    (RademacherCodes, 128, 512, 4096, "auto", 9, True),
    (RademacherCodes, 128, 2048, 16384, "auto", 7, True),
    (RademacherCodes, 128, 2048, 16384, "streaming", 7, True),
    (RademacherCodes, 256, 2048, 131072, "auto", 2, True),
    (HadamardCodes, 128, 128, 16384, "auto", 9, True),
    (HadamardCodes, 128, 2048, 16384, "auto", 9, True),
    (HadamardCodes, 256, 2048, 524288, "auto", 3, False),
]


def embeddings(n: int, f: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.RandomState(0)
    h1, h2 = (torch.from_numpy(np.tanh(random.randn(n, f)).astype(np.float32)).requires_grad_() for _ in range(2))
    return h1, h2


def gradients(loss: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize(("kind", "n", "f", "c", "plan", "rounds", "with_eager"), ROWS)
def test_loss(table, kind, n, f, c, plan, rounds, with_eager) -> None:
    codes, tau = kind(f, c), temperature(f, c, 64)
    h1, h2 = embeddings(n, f)

    def ours() -> torch.Tensor:
        return gradients(falcon_loss(h1, h2, codes, tau, implementation="cpu", plan=plan).loss, h1, h2)

    ours()
    memory = extra_peak_memory(ours)
    functions = {"ours": ours}
    if with_eager:
        dense = codes.dense()

        def eager() -> torch.Tensor:
            return gradients(reference_loss(h1, h2, dense, tau, 1.0, "reverse", None)[0], h1, h2)

        functions["eager"] = eager
    seconds = interleaved(functions, rounds)
    error = None
    if c <= 16384:
        a, b = h1.detach().double().requires_grad_(), h2.detach().double().requires_grad_()
        exact = gradients(falcon_loss(a, b, codes, tau).loss, a, b)
        error = ((ours() - exact).norm() / exact.norm()).item()
    table.add(
        codes=kind.__name__.removesuffix("Codes"),
        shape=f"({n}, {f}, {c})",
        plan=plan,
        **{f"{name} ms": 1e3 * value for name, value in seconds.items()},
        **({"times faster": seconds["eager"] / seconds["ours"]} if with_eager else {}),
        **{"extra MiB": None if memory is None else memory / 2**20, "gradient error": error},
    )


def test_packing(table) -> None:
    """A dictionary of half a million codes drawn and packed from the seed, and an eighth of one packed from dense signs."""
    start = time.perf_counter()
    RademacherCodes(2048, 524288)
    table.add(codes="draw", shape="(2048, 524288)", **{"ours ms": 1e3 * (time.perf_counter() - start)})
    signs = torch.from_numpy(np.random.RandomState(0).rand(65536, 2048) < 0.5)
    start = time.perf_counter()
    pack_signs(signs)
    table.add(codes="pack", shape="(2048, 65536)", **{"ours ms": 1e3 * (time.perf_counter() - start)})
