"""List the operators of a network's step, and the time that a device needs for them, judged by their FLOP and bytes alone.

Nothing is computed: forward and backward run on tensors without storage, and each operator that would start a kernel is recorded
with its FLOP (by the formulas of torch.utils.flop_counter) and the bytes of its inputs and outputs, each read or written once. An
operator takes the longer of FLOP / rate and bytes / bandwidth (Williams, Waterman and Patterson 2009,
doi 10.1145/1498765.1498785), and at least the time of a kernel launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from falcon_fast.hardware.flops import without_storage
from falcon_fast.kernels.gpu.devices import LAUNCH_SECONDS
from falcon_fast.kernels.torch_private import (
    TorchDispatchMode,
    flash_attention,
    packet_of,
    schema_of,
    storage_id,
    tree_leaves,
)

# They start no kernel: they return memory of another tensor, or uninitialised memory, and their schema does not say so.
WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device")


class Operator(NamedTuple):
    """One operator, which is one kernel or a few.

    flop: 0 unless it is a product or a convolution.  bytes: of all inputs and outputs.  pointwise: whether it is element-wise.
    half: whether its output is in 16 bits.
    """

    name: str
    backward: bool
    flop: float
    bytes: float
    pointwise: bool
    convolution: bool
    half: bool


class Trace(NamedTuple):
    """The operators of a network's forward and backward passes.

    calls: number of operators that the host calls, views included.  kept: bytes that forward keeps for backward, without weights.
    """

    operators: list[Operator]
    calls: int
    kept: int


class Rates(NamedTuple):
    """The rates of a device: FLOP/s of matrix products and of convolutions, in 16 bits and in float32; bytes/s; launch time."""

    half: float
    float32: float
    half_convolution: float
    float32_convolution: float
    bandwidth: float
    launch: float = LAUNCH_SECONDS

    def seconds(self, operator: Operator) -> tuple[float, float]:
        """Return the seconds that an operator needs for its FLOP, and for its bytes."""
        if operator.convolution:
            rate = self.half_convolution if operator.half else self.float32_convolution
        else:
            rate = self.half if operator.half else self.float32
        return operator.flop / rate, operator.bytes / self.bandwidth

    def total(self, operators: list[Operator]) -> Bound:
        """Return the operators' total time when run in sequence, split by what limits each."""
        compute = memory = launch = 0.0
        for operator in operators:
            by_flop, by_bytes = self.seconds(operator)
            if max(by_flop, by_bytes) < self.launch:
                launch += self.launch
            elif by_flop >= by_bytes:
                compute += by_flop
            else:
                memory += by_bytes
        return Bound(compute, memory, launch)


class Bound(NamedTuple):
    """Seconds spent in operators that are limited by their FLOP, by their bytes, and by the time of their launch."""

    compute: float
    memory: float
    launch: float

    @property
    def seconds(self) -> float:
        return sum(self)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.calls = 0
        self.backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        self.calls += 1
        packet = packet_of(func)
        name = packet.__name__
        if name in WITHOUT_KERNEL or _is_view(func):
            return out
        tensors = [x for x in (*tree_leaves((args, kwargs)), *tree_leaves(out)) if isinstance(x, torch.Tensor)]
        flop = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        widest = max((x.element_size() for x in tree_leaves(out) if _is_float(x)), default=4)
        self.operators.append(
            Operator(
                name,
                self.backward,
                float(flop),
                float(sum(_bytes(x) for x in tensors)),
                torch.Tag.pointwise in func.tags,
                name.startswith("convolution"),
                widest == 2,
            )
        )
        return out


def _is_view(func: Any) -> bool:
    """Check whether an operator only returns memory of its inputs, and does not write to it."""
    returns = schema_of(func).returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _bytes(x: torch.Tensor) -> int:
    """Return the bytes of a tensor in memory: an expanded tensor is as large as the tensor it was expanded from."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class _FusedAttention(TorchFunctionMode):
    """Record attention as one operator forward and one backward, as it runs on a GPU, whatever a CPU would use."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) >= 3 and kwargs.get("attn_mask") is None:
            return flash_attention(*args[:3])
        return func(*args, **kwargs)


@contextmanager
def _kept_for_backward(weights: set[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Yield the tensors that autograd saves inside the context, by storage. weights: storages that are left out."""
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = storage_id(x)
        if storage not in weights:
            kept.setdefault(storage, x)  # kept alive, so that no other storage gets the same address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def trace(network: nn.Module, images: int, size: int, autocast: torch.dtype | None) -> Trace:
    """Return the operators of forward and backward for `images` images (3, size, size).

    network: returns (features, embeddings).  autocast: the dtype of autocast; None for float32.
    """
    recorder = _Recorder()
    with without_storage(network) as fake:
        fake.train()
        for parameter in fake.parameters():
            parameter.grad = None
        views = torch.empty(images, 3, size, size).to(memory_format=torch.channels_last)
        weights = {storage_id(x) for x in (*fake.parameters(), *fake.buffers())}
        with _kept_for_backward(weights) as kept, recorder, _FusedAttention():
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                _, embeddings = fake(views)
            recorder.backward = True
            embeddings.backward(torch.empty_like(embeddings))
        return Trace(recorder.operators, recorder.calls, sum(x.untyped_storage().nbytes() for x in kept.values()))


# Operators that a compiler fuses with their neighbours although they are not element-wise.
COPIES = ("cat", "stack", "clone", "copy_", "_to_copy")


def fused(operators: list[Operator]) -> list[Operator]:
    """Return the operators as a compiler would fuse them: one that is element-wise, or only copies, joins the operator before it.

    This holds unless the operator before is a product or a convolution. A fused operator only writes its result, a third of its
    bytes, and needs no launch of its own. This is an estimate: its input need not be the output of the operator before it.
    """
    found: list[Operator] = []
    for operator in operators:
        joins = operator.pointwise or operator.name in COPIES
        if joins and found and found[-1].flop == 0 and found[-1].backward == operator.backward:
            before = found.pop()
            operator = before._replace(bytes=before.bytes + operator.bytes / 3)
        found.append(operator)
    return found
