"""The operators of a network's step, and how long a device takes for them by their FLOP and bytes alone.

Nothing is computed: forward and backward run on tensors without storage, and each operator that would start a kernel is noted
with its FLOP (torch.utils.flop_counter's formulas) and the bytes of its inputs and outputs, each read or written once. An
operator takes the longer of FLOP / rate and bytes / bandwidth (Williams, Waterman and Patterson 2009,
doi 10.1145/1498765.1498785), and no less than a kernel's launch.
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
from falcon_fast.kernels.gpu.loss.cost import LAUNCH_SECONDS
from falcon_fast.kernels.torch_private import (
    TorchDispatchMode,
    flash_attention,
    packet_of,
    schema_of,
    storage_id,
    tree_leaves,
)

# They make a tensor of another's memory, or of none, without saying so in their schema.
WITHOUT_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device")


class Operator(NamedTuple):
    """One kernel or a few: FLOP (0 for what is no product), bytes, and whether it goes element by element.

    half: a product of 16-bit numbers.
    """

    name: str
    backward: bool
    flop: float
    bytes: float
    pointwise: bool
    convolution: bool
    half: bool


class Trace(NamedTuple):
    """What forward and backward of a network do, and the bytes that forward keeps for backward, weights left out."""

    operators: list[Operator]
    calls: int
    kept: int


class Rates(NamedTuple):
    """What a device reaches: FLOP/s of matrix products in 16 bits, in float32, of convolutions in each; bytes/s."""

    half: float
    float32: float
    half_convolution: float
    float32_convolution: float
    bandwidth: float
    launch: float = LAUNCH_SECONDS

    def seconds(self, operator: Operator) -> tuple[float, float]:
        """For its FLOP, and for its bytes."""
        if operator.convolution:
            rate = self.half_convolution if operator.half else self.float32_convolution
        else:
            rate = self.half if operator.half else self.float32
        return operator.flop / rate, operator.bytes / self.bandwidth

    def total(self, operators: list[Operator]) -> Bound:
        """The operators one after the other."""
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
    """Seconds spent in operators that are limited by their FLOP, by their bytes, and by being launched at all."""

    compute: float
    memory: float
    launch: float

    @property
    def seconds(self) -> float:
        return sum(self)


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
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
    """Whether it returns memory that it was given and has not written to."""
    returns = schema_of(func).returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _bytes(x: torch.Tensor) -> int:
    """Of what lies in memory: an expanded tensor is as large as what it was expanded from."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class _FusedAttention(TorchFunctionMode):
    """Attention as one operator forward and one backward, as it runs on a GPU, whichever the CPU would take."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) >= 3 and kwargs.get("attn_mask") is None:
            return flash_attention(*args[:3])
        return func(*args, **kwargs)


@contextmanager
def _kept_for_backward(weights: set[int]) -> Iterator[dict[int, torch.Tensor]]:
    """What autograd saves inside, by storage."""
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = storage_id(x)
        if storage not in weights:
            kept.setdefault(storage, x)  # held, so that no other gets its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def trace(network: nn.Module, images: int, size: int, autocast: torch.dtype | None) -> Trace:
    """The operators of forward and backward for `images` images (3, size, size); `network` gives (features, embeddings).

    autocast: its dtype; None for float32.
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


# What a compiler takes into the kernel of its neighbours though it does not go element by element.
COPIES = ("cat", "stack", "clone", "copy_", "_to_copy")


def fused(operators: list[Operator]) -> list[Operator]:
    """As a compiler makes them: what goes element by element, or only copies, is of one kernel with what comes before it.

    Unless that is a product or a convolution, such an operator then only writes its result, a third of its bytes, and is no
    launch of its own: an estimate, for it need not have taken what the one before it made.
    """
    found: list[Operator] = []
    for operator in operators:
        joins = operator.pointwise or operator.name in COPIES
        if joins and found and found[-1].flop == 0 and found[-1].backward == operator.backward:
            before = found.pop()
            operator = before._replace(bytes=before.bytes + operator.bytes / 3)
        found.append(operator)
    return found
