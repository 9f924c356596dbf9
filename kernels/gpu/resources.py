"""The resources that the kernels need, found without a GPU: registers, spills, shared memory and tensor-core instructions.

`python -m falcon_fast.kernels.gpu.resources 90` compiles for sm_90 and prints a table of every kernel that loss, projector and
augmentation launch at their SHAPES (not under TRITON_INTERPRET, where kernels are Python functions). triton ships the tools that
read the binaries.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from falcon_fast.kernels.gpu.launch import Launch, compile_ahead, recording
from falcon_fast.kernels.gpu.loss.gradient import combine
from falcon_fast.kernels.gpu.loss.loss import falcon_loss_parts
from falcon_fast.kernels.gpu.projector.batchnorm import Averages, batch_statistics, running_statistics
from falcon_fast.kernels.gpu.projector.projector import gradients, normalise
from falcon_fast.kernels.gpu.views.augmentation import Recipe, augment_views_triton
from falcon_fast.kernels.gpu.views.crops import crop_views
from falcon_fast.kernels.spec import LossSpec

PROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100 and H200, B200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block, CUDA C++ programming guide
TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}

# N, f, c, Hadamard codes, plan
SHAPES = [
    (64, 2048, 16384, False, "stored"),
    (1024, 2048, 65536, False, "stored"),
    (1024, 2048, 16384, False, "streaming"),
    (64, 2048, 16384, True, "auto"),
]
MORE_SHAPES = [
    *((64, f, 16 * f, True, "auto") for f in (16, 128, 256, 512, 1024)),
    (1024, 2048, 524288, True, "auto"),
    (20, 128, 16384, False, "stored"),
    (1, 100, 1000, False, "streaming"),
]
# Rows, f, row_norm (None: tanh), dtype of the product, training
PROJECTOR_SHAPES = [
    (128, 2048, None, torch.float16, True),
    (2048, 2048, None, torch.bfloat16, False),
    (2048, 2048, 16.0, torch.float16, True),
]
MORE_PROJECTOR_SHAPES = [
    (200, 100, 4.0, torch.float32, True),
    (8192, 4096, None, torch.float32, True),
    (1, 100, 4.0, torch.bfloat16, False),
]
# Views, side, recipe, dtype, uint8 channels_last
_EVERYTHING = Recipe((True, True, True, True), True, 2.0, True, 128 / 255)
AUGMENTATION_SHAPES = [
    (128, 32, _EVERYTHING._replace(max_sigma=0.0), torch.bfloat16, True),
    (512, 224, _EVERYTHING, torch.float16, True),
]
CROP_SHAPES = [(512, 32, 32), (64, 96, 64), (1, 5, 1)]  # images, their side, size
MORE_AUGMENTATION_SHAPES = [
    (512, 32, _EVERYTHING, torch.float32, True),
    (128, 64, _EVERYTHING, torch.bfloat16, True),
    (64, 224, _EVERYTHING._replace(solarize=False), torch.bfloat16, False),
    (64, 96, _EVERYTHING._replace(max_sigma=0.0), torch.float32, True),
    (7, 1024, _EVERYTHING, torch.bfloat16, True),
    (64, 28, Recipe((True, False, False, False), False, 0.0, False, 0.5), torch.float16, True),
]


class Resources(NamedTuple):
    """One kernel: registers and stack bytes (spills) per thread, shared memory bytes per block, instructions by name."""

    name: str
    constants: dict[str, Any]
    warps: int
    registers: int
    stack: int
    shared: int
    instructions: dict[str, int]


def launches(shape: tuple[int, int, int, bool, str], architecture: int, prior: str = "reverse") -> list[Launch]:
    """Return the launches of one loss, forward and backward, on a GPU of the architecture (80, 90, 100)."""
    n, f, c, is_hadamard, plan = shape
    h1, h2 = (torch.empty(n, f, device="meta") for _ in range(2))
    words = torch.empty(c // f if is_hadamard else c, -(-f // 32), dtype=torch.int32, device="meta")
    with recording(divmod(architecture, 10), PROCESSORS[architecture]) as found:
        _, parts = falcon_loss_parts(h1, h2, words, LossSpec(c, is_hadamard, 13.9, prior=prior, plan=plan))
        assert parts is not None
        combine(parts.parts, parts.quantum, torch.empty((), device="meta"), torch.float32)
    # In a process group the two halves of the columns' kernel are separate launches.
    for launched in [x for x in found if x.kernel is not None and "SUMS" in x.constants]:
        for half in ({"TERMS": False}, {"SUMS": False}):
            found.append(launched._replace(constants={**launched.constants, **half}))
    return found


def projector_launches(
    shape: tuple[int, int, float | None, torch.dtype, bool], architecture: int
) -> tuple[list[Launch], list[Launch]]:
    """Return the launches of a projector after its linear product, forward and backward (two views in training)."""
    rows, f, row_norm, dtype, training = shape
    x, g, column = (torch.empty(size, device="meta") for size in ((rows, f), (rows, f), (f,)))
    averages = Averages(column, column, torch.empty((), dtype=torch.int64, device="meta"), 0.1)
    with recording(divmod(architecture, 10), PROCESSORS[architecture]) as found:
        if training:
            statistics = batch_statistics(x, 2, column, averages, 1e-5, None)
        else:
            statistics = running_statistics(column, column, column, 1e-5)
        _, length = normalise(x, statistics, column, column, row_norm, torch.float32)
        forward = len(found)
        gradients(g, x, statistics, column, column, length, row_norm, dtype, None)
    return found[:forward], found[forward:]


def augmentation_launches(shape: tuple[int, int, Recipe, torch.dtype, bool], architecture: int) -> list[Launch]:
    """Return the launches of the photometric stage."""
    n, side, recipe, dtype, channels_last = shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.empty(n, 3, side, side, dtype=torch.uint8, device="meta").to(memory_format=layout)
    packed, column = torch.empty(n, 11, device="meta"), torch.empty(3, device="meta")
    flag = packed[:, 9] > 0
    with recording(divmod(architecture, 10), PROCESSORS[architecture]) as found:
        augment_views_triton(
            images, packed[:, :4], packed[:, 4:8], flag, packed[:, 8], flag, column, column, recipe, dtype
        )
    return found


def resources(launched: Launch, architecture: int) -> Resources:
    """Compile a recorded launch for the architecture and return the resources it needs."""
    compiled = compile_ahead(launched, divmod(architecture, 10))
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
        listing = subprocess.run(
            [tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    instructions: dict[str, int] = {}
    for name in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", listing, re.MULTILINE):
        instructions[name] = instructions.get(name, 0) + 1
    return Resources(
        launched.kernel.__name__,
        launched.constants,
        launched.num_warps,
        int(found[1]),
        int(found[2]),
        compiled.metadata.shared,
        instructions,
    )


def crop_launches(shape: tuple[int, int, int]) -> list[Launch]:
    """Return the launches that crop and resize two views of n resident images; shape: n, side of an image, side of a view."""
    n, side, size = shape
    images = torch.empty(4, side, side, 3, dtype=torch.uint8, device="meta")
    indices = torch.empty(n, dtype=torch.int64, device="meta")
    boxes = torch.empty(2 * n, 4, dtype=torch.int64, device="meta")
    with recording((8, 0), PROCESSORS[80]) as found:
        crop_views(images, indices, boxes, torch.empty(2 * n, dtype=torch.bool, device="meta"), size)
    return found


def distinct(launched: Iterable[Launch], architecture: int) -> Iterator[Resources]:
    """Yield the resources of each kernel, each configuration once."""
    seen = set()
    for launch in launched:
        key = (str(launch.kernel), str(sorted(launch.constants.items())), str(launch.signature))
        if launch.kernel is not None and key not in seen:
            seen.add(key)
            yield resources(launch, architecture)


def all_resources(architecture: int, shapes: list[tuple[int, int, int, bool, str]], prior: str) -> Iterator[Resources]:
    """Yield the resources of the kernels that the loss launches at the shapes."""
    return distinct((x for shape in shapes for x in launches(shape, architecture, prior)), architecture)


def projector_resources(
    architecture: int, shapes: list[tuple[int, int, float | None, torch.dtype, bool]]
) -> Iterator[Resources]:
    """Yield the resources of the kernels that the projector launches at the shapes."""
    every = (x for shape in shapes for part in projector_launches(shape, architecture) for x in part)
    return distinct(every, architecture)


def augmentation_resources(
    architecture: int, shapes: list[tuple[int, int, Recipe, torch.dtype, bool]]
) -> Iterator[Resources]:
    """Yield the resources of the kernels of the photometric stage at the shapes, and of those that crop resident images."""
    every = (x for shape in shapes for x in augmentation_launches(shape, architecture))
    crops = (x for shape in CROP_SHAPES for x in crop_launches(shape))
    return distinct(itertools.chain(every, crops), architecture)


def main(architecture: int, *, more: bool = False, prior: str = "reverse") -> None:
    print(f"{'kernel':24} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>7}  tensor cores, constants")
    of_loss = all_resources(architecture, SHAPES + (MORE_SHAPES if more else []), prior)
    shapes = PROJECTOR_SHAPES + (MORE_PROJECTOR_SHAPES if more else [])
    of_projector = projector_resources(architecture, shapes)
    views = AUGMENTATION_SHAPES + (MORE_AUGMENTATION_SHAPES if more else [])
    for found in itertools.chain(of_loss, of_projector, augmentation_resources(architecture, views)):
        used = sum(count for name, count in found.instructions.items() if name in ("HMMA", *TENSOR_CORE.values()))
        print(
            f"{found.name:24} {found.warps:5} {found.registers:9} {found.stack:5} {found.shared:7}  {used:3} "
            + ", ".join(f"{name}={value}" for name, value in found.constants.items()),
            flush=True,
        )


if __name__ == "__main__":
    main(int(sys.argv[1]), more="--more" in sys.argv, prior="forward" if "--forward" in sys.argv else "reverse")
