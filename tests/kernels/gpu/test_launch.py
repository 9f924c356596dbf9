"""Kept kernels: a launch starts the very kernel, with the very arguments, that Triton would have found.

Triton runs here with a driver that stands in for CUDA's: kernels are compiled for sm_80, and their launches noted.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# In a process of its own: under TRITON_INTERPRET kernels are Python functions, which nothing compiles.
PROGRAM = """
import itertools
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

started = []


class Launcher:
    def __init__(self, source, metadata):
        self.compiled = metadata.hash

    def __call__(self, *arguments):
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        started.append((self.compiled, [(type(x), x) for x in values[:4]], [(type(x), x) for x in values[9:]]))


class Driver:
    launcher_cls = Launcher

    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))
        unload_module = staticmethod(lambda *_: None)
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 166912})

    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda _: 7)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 80, 32))


driver.set_active(Driver())
import triton
import triton.language as tl
from falcon_fast.kernels.gpu import launch as launching


@triton.jit
def kernel(p_in, p_out, n, factor, FIRST: tl.constexpr, SECOND: tl.constexpr):
    o = tl.program_id(0) * FIRST + tl.arange(0, FIRST)
    tl.store(p_out + o, tl.load(p_in + o, mask=o < n, other=0) * factor + SECOND, mask=o < n)


memory = torch.zeros(65)
tensors = [memory[:64], memory[1:], torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.int32)]
sizes = [1, 2, 16, 2**31]
factors = [1, 1.0, 2, 2.0, True]
cases = list(itertools.product(tensors, tensors[:2], sizes[1:3], factors[2:3])) + list(
    itertools.product(tensors[:1], tensors[:1], sizes, factors)
)
options = [dict(FIRST=32, SECOND=second, num_warps=warps) for second, warps in [(0, 1), (1, 1), (0, 2)]]
every = list(itertools.product([(1,), (3, 2)], cases, options[:1]))
every += [((1,), case, chosen) for case in cases[:3] for chosen in options]
for grid, arguments, chosen in every:
    kernel[grid](*arguments, num_stages=3, **chosen)
expected, asked = started[:], []
for _ in range(2):  # found by Triton, then kept
    started.clear()
    for grid, arguments, chosen in every:
        launching.launch(kernel, grid, *arguments, **chosen)
    # Triton's own launches have a grid of three, too.
    assert len(started) == len(expected)
    for one, other, case in zip(started, expected, every):
        assert one == other, (case, one, other)
assert len({compiled for compiled, _, _ in started}) > 15

type(kernel).run = None  # Triton is not asked again
launching.launch(kernel, *every[0][:1], *every[0][1], **every[0][2])

type(kernel).run = lambda self, *_, **__: asked.append(1)
launching.MOST_COMPILED = len(launching._compiled)
launching.launch(kernel, (1,), memory, memory, 5, 5.0, FIRST=16, SECOND=0, num_warps=1)
assert len(launching._compiled) == 1 and asked
"""


def test_kept_kernels_are_those_that_triton_finds(tmp_path):
    program = tmp_path / "program.py"  # Triton reads the source of its kernels
    program.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
