"""The launch of every kernel, in one place, so that the same launches can be listed without a GPU.

Inside `recording(capability, processors)` nothing runs: `launch` records the kernel with its exact signature instead. The whole
loss can then be traced on meta tensors. This proves that its host code never waits for a value from the device, counts its
launches, and gives the tests the kernels that they compile ahead of time for each architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton

from falcon_fast.kernels.gpu.support import INTERPRETING


class Launch(NamedTuple):
    """One launch of a kernel: its argument types as Triton specialises them, compile-time values, warps and pipeline stages.

    `kernel` is None for a matrix product that torch computes.
    """

    kernel: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: frozenset[str]  # pointers and integers known to be multiples of 16
    num_warps: int
    num_stages: int


class Facts(NamedTuple):
    """The properties of a GPU on which a plan depends: name, compute capability and number of multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int


class Recording(NamedTuple):
    facts: Facts
    launches: list[Launch]


_recording: ContextVar[Recording | None] = ContextVar("falcon_fast_recording", default=None)

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


@contextmanager
def recording(capability: tuple[int, int], processors: int) -> Iterator[list[Launch]]:
    """Record launches instead of making them, as for a GPU of this compute capability and number of multiprocessors."""
    launches: list[Launch] = []
    token = _recording.set(Recording(Facts("", capability, processors), launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def device_facts(device: torch.device) -> Facts:
    """Return the facts of a GPU; inside a recording those of the recording; in the interpreter those of an A100."""
    if (active := _recording.get()) is not None:
        return active.facts
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Facts(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
    return Facts("A100", (8, 0), 108)


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up. (triton.cdiv, which also serves kernels, takes 3 us.)"""
    return -(-a // b)


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
MOST_COMPILED = 4096  # keys: a run has a few dozen, and one more for each range of codes


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 3, **constants: Any
) -> None:
    """Start `kernel` over `grid` on the device of its tensors, on torch's current stream.

    `arguments` are the first arguments of the kernel, in its order; `constants` are all the others. Triton determines the
    compiled kernel anew at each launch; here it is looked up by everything that determines it. That takes 12 us of the host's
    time instead of 18 with 16 arguments, and 7.5 instead of 9.5 with 5, without the time of the driver
    (benchmarks/bench_launch.py).
    """
    if (active := _recording.get()) is not None:
        active.launches.append(_described(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    if INTERPRETING:
        kernel[grid](*arguments, **constants)
        return
    device = next(x for x in arguments if isinstance(x, torch.Tensor)).device
    key = (
        id(kernel),
        device,
        num_warps,
        num_stages,
        *constants.items(),
        # 1, 1.0 and True are the same key, but not the same kernel.
        *[(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else (x.__class__, x) for x in arguments],
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **constants}
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        _start(key, kernel, grid, arguments, options)
    else:
        with torch.cuda.device(device):
            _start(key, kernel, grid, arguments, options)


def _start(
    key: tuple[Any, ...], kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Launch the kernel that was compiled for `key`, or let Triton find or compile it."""
    if (found := _compiled.get(key)) is not None:
        compiled, constants = found
        compiled[(*grid, 1, 1)](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **options)
    if len(_compiled) >= MOST_COMPILED:
        _compiled.clear()
    _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, add: bool) -> None:
    """Compute out = a b, or out += a b, by torch; a (m, k) and b (k, n) of one dtype, out (m, n) in that dtype or in float32."""
    if (active := _recording.get()) is not None:
        active.launches.append(Launch(None, (), {}, {}, frozenset(), 0, 0))
    elif INTERPRETING and a.device.type == "cpu":  # torch has no product of fp16 with a float32 result there
        product = a.float() @ b.float()
        out.add_(product) if add else out.copy_(product)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _described(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int, stages: int
) -> Launch:
    names = [name for name in kernel.arg_names if name not in constants]
    signature, aligned, values = {}, set(), dict(constants)
    for name, value in zip(names, arguments, strict=True):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.add(name)
        elif isinstance(value, int) and value == 1:  # Triton compiles the value 1 in
            values[name] = 1
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.add(name)
        else:
            signature[name] = "fp32"
    return Launch(kernel, grid, signature, values, frozenset(aligned), warps, stages)


def compile_ahead(launched: Launch, capability: tuple[int, int]) -> Any:
    """Compile the kernel of a recorded launch for a GPU of `capability`, which need not be present. Not in the interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launched.kernel.arg_names
    signature = {name: launched.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in launched.constants.items()}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launched.aligned}
    source = ASTSource(launched.kernel, signature, constants, attributes)
    major, minor = capability
    return triton.compile(
        source,
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={"num_warps": launched.num_warps, "num_stages": launched.num_stages},
    )
