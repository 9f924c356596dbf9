"""Every Triton kernel of the loss compiled ahead of time for three architectures: no spills, tensor cores, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100)
WITH_PRODUCTS = {"logits_kernel", "product_kernel", "rows_kernel", "gradient_kernel"}

# In a process of its own: under TRITON_INTERPRET kernels are Python functions, which nothing compiles.
PROGRAM = """
import json, sys
from falcon_fast.kernels.gpu import resources
architecture, shapes, prior = int(sys.argv[1]), sys.argv[2], sys.argv[3]
for found in resources.all_resources(architecture, getattr(resources, shapes), prior):
    print(json.dumps(found._asdict()), flush=True)
"""


def compiling(architecture: int, shapes: str, prior: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = [sys.executable, "-c", PROGRAM, str(architecture), shapes, prior]
    return subprocess.Popen(arguments, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def check(architecture: int, process: subprocess.Popen[str]) -> None:
    from falcon_fast.kernels.gpu import resources

    output, error = process.communicate()
    assert process.returncode == 0, error
    kernels = [json.loads(line) for line in output.splitlines()]
    assert len(kernels) >= 12
    for kernel in kernels:
        what = f"{kernel['name']} {kernel['constants']} with {kernel['warps']} warps"
        assert kernel["stack"] == 0 and not {"LDL", "STL"} & kernel["instructions"].keys(), f"{what} spills"
        assert kernel["shared"] <= resources.SHARED_LIMIT[architecture], what
        products = {"HMMA", resources.TENSOR_CORE[architecture]} & kernel["instructions"].keys()
        assert products or kernel["name"] not in WITH_PRODUCTS, f"{what} does not use the tensor cores"
    for name in ("logits_kernel", "product_kernel"):
        found = [kernel["instructions"] for kernel in kernels if kernel["name"] == name]
        assert found and all(resources.TENSOR_CORE[architecture] in instructions for instructions in found)


@pytest.fixture(scope="module")
def running() -> Iterator[dict[int, subprocess.Popen[str]]]:
    processes = {architecture: compiling(architecture, "SHAPES", "reverse") for architecture in ARCHITECTURES}
    yield processes
    for process in processes.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiled_ahead_of_time(running, architecture) -> None:
    check(architecture, running[architecture])


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["reverse", "forward"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_width_and_prior(architecture, prior) -> None:
    check(architecture, compiling(architecture, "MORE_SHAPES", prior))
