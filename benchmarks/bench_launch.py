"""The host's time to launch a kernel: through Triton, and through `launch`, which caches what Triton found. No GPU is needed.

Without a GPU a stand-in replaces CUDA's driver: it compiles for sm_90 and starts nothing, so that the driver's share is missing.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402


class StandIn:
    """The parts of Triton's driver that a launch uses."""

    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 232448})

    launcher_cls = staticmethod(lambda source, metadata: lambda *_: None)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    driver.set_active(StandIn())
from falcon_fast.kernels.gpu.launch import launch  # noqa: E402
from falcon_fast.kernels.gpu.loss import expand, logits  # noqa: E402
from falcon_fast.kernels.gpu.support import INTERPRETING  # noqa: E402

CALLS, ROUNDS = 200, 15


def by_triton(kernel, grid, *arguments, **options):
    kernel[grid](*arguments, **options)


def logits_launch(start):
    h, scale, words = torch.zeros(64, 64, dtype=torch.float16), torch.zeros(64), torch.zeros(64, 2, dtype=torch.int32)
    h, scale, words = (x.to(DEVICE) for x in (h, scale, words))
    scratch = torch.zeros(5, 2 * 64 * 128, device=DEVICE)
    pointers = (h, scale, words, scratch[4].half(), *scratch[:3], words)
    sizes = (64, 64, 0, 0, 64, 2, 128, 1)
    blocks = {"ROWS": 32, "CODES": 128, "DEPTH": 64, "EXPANDED": False, "TILE": 128, "STORE": True, "STATISTICS": False}
    return lambda: start(logits.logits_kernel, (1, 1), *pointers, *sizes, **blocks, num_warps=4, num_stages=3)


def expand_launch(start):
    words, out = torch.zeros(64, 2, dtype=torch.int32), torch.zeros(64, 64, dtype=torch.float16)
    words, out = words.to(DEVICE), out.to(DEVICE)
    blocks = {"ORDERED": True, "CODES": 16, "WORDS": 8}
    return lambda: start(expand.expand_kernel, (4, 1), words, out, 64, 64, 2, **blocks, num_warps=4, num_stages=3)


@pytest.mark.skipif(INTERPRETING, reason="kernels are Python functions under TRITON_INTERPRET: unset it")
@pytest.mark.parametrize("make", [logits_launch, expand_launch])
def test_launch(table, make):
    functions = {"triton": make(by_triton), "kept": make(launch)}
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(ROUNDS):
        for name, function in functions.items():
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            seconds[name].append((time.perf_counter() - start) / CALLS)
    found = {name: 1e6 * statistics.median(values) for name, values in seconds.items()}
    arguments = {logits_launch: 16, expand_launch: 5}[make]
    table.add(
        arguments=arguments, triton_us=found["triton"], kept_us=found["kept"], ratio=found["triton"] / found["kept"]
    )
